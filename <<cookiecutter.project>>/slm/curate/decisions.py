"""What people decided about single rows: data/raw/decisions.jsonl, append-only; the latest line of an id holds."""

from datetime import UTC, datetime
from typing import Literal

from pydantic import Field, ValidationError

from slm import registry
from slm.errors import SlmError
from slm.rows import Record, append_jsonl, explain, iter_lines

FILE = "data/raw/decisions.jsonl"


class Decision(Record, frozen=True):
    """One person's word on one row. `answer` is the mended answer of an edit."""

    id: str
    decision: Literal["accept", "reject", "edit"]
    reviewer: str = Field(min_length=1)
    time: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    answer: str | None = None
    reason: str = ""


def read_decisions(settings) -> dict[str, Decision]:
    """The decision in force for each row id. Raises SlmError with file:line at a line that is none."""
    path, found = settings.path(FILE), {}
    for number, line in iter_lines(path) if path.is_file() else ():
        try:
            decision = Decision.model_validate_json(line)
        except ValidationError as error:
            raise SlmError(f"{path}:{number}: {explain(error)}. Mend or remove that line.") from None
        found[decision.id] = decision
    why = {"decision": "reject", "reviewer": "python -m slm forget", "reason": "was forgotten, and must not come back"}
    return found | {i: Decision(id=i, **why) for tomb in registry.read(settings, "forgotten") for i in tomb["rows"]}


def decide(settings, decision: Decision) -> Decision:
    """Append one decision, locked and on disk when this returns."""
    with registry.locked(settings, "decisions"):
        append_jsonl(settings.path(FILE), [decision.model_dump(exclude_none=True)])
    return decision
