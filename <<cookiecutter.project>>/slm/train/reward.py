"""GRPO's rewards, read off the contract: does an answer parse, keep the schema, get each field right, keep its length?"""

from collections.abc import Callable, Sequence
from functools import lru_cache

from slm.contract import Contract
from slm.evaluate.scorers import Score, score_row
from slm.models import Answer
from slm.rows import Row


def rewards(contract: Contract, rows: Sequence[Row], weights: dict[str, float]) -> dict[Callable, float]:
    """Reward function -> weight, as `GRPOTrainer` takes them: each gives 0 to 1 per completion, told the number of its
    row in the column `row`; None where the row says nothing about it. "fields" becomes one function per output field,
    which share its weight; "length" is the shorter of answer and gold over the longer; "metric" is the primary one."""

    @lru_cache(10_000)
    def judge(n: int, text: str) -> Score:
        return score_row(contract, rows[n], Answer(text, 0.0))

    def length(score: Score, row: Row) -> float:
        low, high = sorted((len(score.text), len(row.answer)))
        return low / max(1, high)

    def field(name: str) -> Callable:
        def share(score: Score, _: Row) -> float | None:
            own = [ok for key, ok in score.fields.items() if key == name or key.startswith(f"{name}.")]
            return sum(own) / len(own) if own else None

        return share

    parts: dict[str, Callable] = {
        "parses": lambda score, _: float(score.stage != "json"), "schema": lambda score, _: float(score.parsed is not None),
        "metric": lambda score, _: score.value, "length": length,
    }  # fmt: skip
    found, names = {name: (weights.get(name, 0), measure) for name, measure in parts.items()}, contract.properties()
    found |= {f"field_{name}": (weights.get("fields", 0) / len(names), field(name)) for name in names}

    def reward(name: str, measure: Callable) -> Callable:
        def function(completions: list, row: list[int], **_) -> list[float | None]:
            texts = [completion[-1]["content"] for completion in completions]
            return [measure(judge(n, text), rows[n]) for n, text in zip(row, texts, strict=True)]

        function.__name__ = name  # what the trainer's log calls it
        return function

    return {reward(name, measure): weight for name, (weight, measure) in found.items() if weight}
