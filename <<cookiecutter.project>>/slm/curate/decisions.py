"""What people decided about single rows: data/raw/decisions.jsonl, append-only; the latest line of an id holds."""

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from slm.errors import SlmError
from slm.rows import explain, iter_lines


class Decision(BaseModel):
    """One person's word on one row. `answer` is the mended answer of an edit."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    id: str
    decision: Literal["accept", "reject", "edit"]
    reviewer: str = Field(min_length=1)
    time: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    answer: str | None = None
    reason: str = ""


def decisions_file(settings) -> Path:
    """data/raw/decisions.jsonl."""
    return settings.path("data/raw/decisions.jsonl")


def read_decisions(settings) -> dict[str, Decision]:
    """The decision in force for each row id. Raises SlmError with file:line at a line that is none."""
    path, found = decisions_file(settings), {}
    for number, line in iter_lines(path) if path.is_file() else ():
        try:
            decision = Decision.model_validate_json(line)
        except ValidationError as error:
            raise SlmError(f"{path}:{number}: {explain(error)}. Mend or remove that line.") from None
        found[decision.id] = decision
    return found


def decide(settings, decision: Decision) -> Decision:
    """Append one decision, locked and on disk when this returns."""
    path = decisions_file(settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"), path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(decision.model_dump(exclude_none=True), ensure_ascii=False) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    return decision
