"""The quality rubric of the optional judge: seven dimensions from 1 to 5, and when a row is accepted."""

from typing import Literal

from pydantic import BaseModel, ValidationError

from slm.contract import first_object
from slm.rows import explain

DIMENSIONS = ("realism", "correctness", "format", "difficulty", "diversity", "learnability", "safety")
TOTAL_AT_LEAST, CORRECTNESS_AT_LEAST, FORMAT_IS, SAFETY_AT_LEAST = 26, 4, 5, 4


class Opinion(BaseModel):
    """A judge's reply: its own word, its scores and why."""

    decision: Literal["accept", "reject"]
    scores: dict[str, float]
    reason: str = ""


def accepts(scores: dict[str, float]) -> bool:
    """Whether a judged row passes: 26 of 35 points, correctness >= 4, format 5, safety >= 4. A missing score fails."""
    return not shortfall(scores)


def shortfall(scores: dict[str, float]) -> str:
    """What keeps the scores below the rule of `accepts`, in words; "" when nothing does."""
    absent = [n for n in DIMENSIONS if not isinstance(scores.get(n), (int, float)) or not 1 <= scores[n] <= 5]
    if absent:
        return f"no score from 1 to 5 for {', '.join(absent)}"
    total = sum(scores[name] for name in DIMENSIONS)
    least = {"correctness": CORRECTNESS_AT_LEAST, "format": FORMAT_IS, "safety": SAFETY_AT_LEAST}
    low = [f"{name} {scores[name]:g}, at least {n}" for name, n in least.items() if scores[name] < n]
    return "; ".join(low + ([f"total {total:g} of 35, at least {TOTAL_AT_LEAST}"] if total < TOTAL_AT_LEAST else []))


def refusal(reply: str) -> tuple[str, dict]:
    """Why a judge's reply refuses its row ("" when it does not), and the scores. A reply that cannot be read refuses."""
    try:
        opinion = Opinion.model_validate_json(first_object(reply))
    except ValidationError as error:
        return f"the judge's reply cannot be read ({explain(error)})", {}
    low = shortfall(opinion.scores)
    said = f"the judge says reject: {opinion.reason}" if opinion.decision == "reject" else ""
    return "; ".join(part for part in (low, low and opinion.reason or said) if part), opinion.scores
