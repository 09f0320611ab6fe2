"""The log of a released model: one JSON object per line, appended by the server, read tolerantly."""

import json
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from slm.errors import SlmError
from slm.rows import explain


class LogLine(BaseModel):
    """One request. `input`: the user's text. `output`: the model's answer, unparsed. `latency_s`: what the caller
    waited. `parse_ok`: whether the server could use the answer. `correction`: the right answer as contract JSON when
    a person gave one. `consent`: whether the customer's data may be used to improve the model; without it the line is
    counted, not kept. `group`: customer or conversation, so that one is never on both sides of a split. Other fields
    are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    request_id: str
    time: datetime
    input: str
    output: str
    latency_s: float
    parse_ok: bool
    model_version: str
    consent: bool
    correction: str | None = None
    group: str = ""


@dataclass(frozen=True)
class Logs:
    """The usable lines, and what was left out and why: `problems` as (line number, reason), counts for the rest."""

    lines: list[LogLine]
    problems: list[tuple[int, str]]
    read: int
    no_consent: int = 0
    repeated: int = 0
    ignored_fields: dict[str, int] = field(default_factory=dict)

    def table(self) -> list[dict]:
        """What became of the lines."""
        counts = {
            "read": self.read, "torn or invalid": len(self.problems), "without consent": self.no_consent,
            "repeated request": self.repeated, "usable": len(self.lines),
            "of these not parsed": sum(not line.parse_ok for line in self.lines),
            "of these corrected": sum(line.correction is not None for line in self.lines),
        }  # fmt: skip
        return [{"lines": name, "count": count} for name, count in counts.items()]


def read_logs(path: Path) -> Logs:
    """Read a log. A torn or invalid line is reported with its number and does not stop the rest. The reason never
    repeats the line's text. Raises SlmError when the file is missing or no line is readable."""
    path = Path(path)
    if not path.is_file():
        raise SlmError(f"{path}: there is no such file; set production.logs in project.yaml.")
    lines: dict[str, LogLine] = {}
    problems, ignored, read, no_consent, repeated = [], Counter(), 0, 0, 0
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, 1):
            if not raw.strip():
                continue
            read += 1
            try:
                record = json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
                line = LogLine.model_validate(record)
            except ValidationError as error:
                problems.append((number, explain(error)))
                continue
            except (ValueError, RecursionError) as error:
                problems.append((number, "not UTF-8" if isinstance(error, UnicodeDecodeError) else "not JSON, torn in writing?"))
                continue
            ignored.update(name for name in record if name not in LogLine.model_fields)
            no_consent += not line.consent
            repeated += line.consent and line.request_id in lines
            if line.consent:
                lines.setdefault(line.request_id, line)
    if read and not lines and not no_consent:
        raise SlmError(f"{path}:{problems[0][0]}: {problems[0][1]}; no line of this file is a log line.")
    return Logs(list(lines.values()), problems, read, no_consent, repeated, dict(ignored))
