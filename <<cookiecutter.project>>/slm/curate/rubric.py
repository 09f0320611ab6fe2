"""The quality rubric of the optional judge: seven dimensions from 1 to 5, and when a row is accepted."""

from typing import Literal

from pydantic import BaseModel, ValidationError

from slm.contract import first_object
from slm.rows import explain

DIMENSIONS = ("realism", "correctness", "format", "difficulty", "diversity", "learnability", "safety")
LEAST = {"correctness": 4, "format": 5, "safety": 4}
TOTAL = 26  # of 35


class Opinion(BaseModel):
    """A judge's reply: its own word, its scores and why."""

    decision: Literal["accept", "reject"]
    scores: dict[str, float]
    reason: str = ""


def shortfall(scores: dict[str, float]) -> str:
    """What keeps scores below the rule (26 of 35 points, correctness >= 4, format 5, safety >= 4); "" when they pass."""
    absent = [name for name in DIMENSIONS if not 1 <= scores.get(name, 0) <= 5]
    if absent:
        return f"no score from 1 to 5 for {', '.join(absent)}"
    low = [f"{name} {scores[name]:g}, at least {least}" for name, least in LEAST.items() if scores[name] < least]
    total = sum(scores[name] for name in DIMENSIONS)
    return "; ".join(low + [f"total {total:g} of 35, at least {TOTAL}"] * (total < TOTAL))


def refusal(reply: str) -> tuple[str, dict]:
    """Why a judge's reply refuses its row ("" when it does not), and the scores. A reply that cannot be read refuses."""
    try:
        said = Opinion.model_validate_json(first_object(reply))
    except ValidationError as error:
        return f"the judge's reply cannot be read ({explain(error)})", {}
    why = shortfall(said.scores) or ("the judge says reject" if said.decision == "reject" else "")
    return why and f"{why}: {said.reason}", said.scores
