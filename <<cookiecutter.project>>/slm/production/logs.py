"""The log of a released model: one JSON object per line, as client/log.py writes it, read tolerantly."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from glob import escape
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from slm.errors import SlmError
from slm.rows import explain

LONGEST = 1_000_000  # bytes of a line: what is longer is no request, and is never held in memory
CLOCK = timedelta(hours=1)  # a line that much before the one above it: the clock was set, or files were mixed


class LogLine(BaseModel):
    """One request. `input`: the user's text. `output`: the model's answer, unparsed. `latency_s`: what the caller
    waited. `parse_ok`: whether the caller could use the answer. `correction`: the right answer as contract JSON when
    a person gave one. `consent`: whether the customer's data may be used to improve the model; without it the line is
    counted, not kept. `group`: customer or conversation, so that one is never on both sides of a split. `license`: the
    terms under which the text may be used, where there are any. `confidence`: how sure the model was of its answer, 0
    to 1 (client.py: the least probability of a token); `tokens_in`, `tokens_out`: of prompt and answer; all three where
    the server tells them. Other fields are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    request_id: str = Field(min_length=1)
    time: datetime
    input: str
    output: str
    latency_s: float = Field(ge=0, allow_inf_nan=False)
    parse_ok: bool
    model_version: str
    consent: bool
    correction: str | None = None
    group: str = ""
    license: str = ""
    confidence: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    tokens_in: int | None = Field(None, ge=0)
    tokens_out: int | None = Field(None, ge=0)

    @field_validator("time")
    @classmethod
    def _in_a_zone(cls, time: datetime) -> datetime:
        return time if time.tzinfo else time.replace(tzinfo=UTC)


@dataclass(frozen=True)
class Logs:
    """The usable lines, and what was left out and why: `problems` as (file:line, reason), counts for the rest. `clock`
    are kept lines whose time runs backwards; `dropped` is what the logger said it could not write; `every` are
    all requests, for monitor and ledger: of those without consent the figures and not a word of text."""

    lines: list[LogLine]
    problems: list[tuple[str, str]]
    read: int
    no_consent: int = 0
    repeated: int = 0
    dropped: int = 0
    clock: list[tuple[str, str]] = field(default_factory=list)
    ignored_fields: dict[str, int] = field(default_factory=dict)
    every: list[LogLine] = field(default_factory=list)

    def table(self) -> list[dict]:
        """What became of the lines."""
        counts = {
            "read": self.read, "torn or invalid": len(self.problems), "without consent": self.no_consent,
            "repeated request": self.repeated, "never written, the logger says": self.dropped,
            "time runs backwards (kept)": len(self.clock), "usable": len(self.lines),
            "of these not parsed": sum(not line.parse_ok for line in self.lines),
            "of these corrected": sum(line.correction is not None for line in self.lines),
        }  # fmt: skip
        return [{"lines": name, "count": count} for name, count in counts.items()]


def files_of(path: Path) -> list[Path]:
    """A log's files, oldest first: those that were rotated away (.2, .1), then the log itself."""
    path = Path(path)
    old = [f for f in path.parent.glob(f"{escape(path.name)}.*") if f.suffix[1:].isdigit()]
    return sorted(old, key=lambda f: -int(f.suffix[1:])) + ([path] if path.is_file() else [])


def read_logs(path: Path) -> Logs:
    """Read a log with its rotated files. A torn, overlong or invalid line is reported with its place and does not stop
    the rest; the reason never repeats the line's text. A request that was written twice counts once; a line of
    request_id and a correction or consent alone completes the request that it names. Raises SlmError when there is no
    file or no line is readable."""
    lines: dict[str, LogLine] = {}
    problems, clock, ignored, last = [], [], Counter(), None
    read = repeated = dropped = 0
    if not files_of(path):
        raise SlmError(f"{path}: there is no such file; set production.logs in project.yaml.")
    for place, raw in _lines(files_of(path)):
        read += 1
        try:
            record = json.loads(raw) if len(raw) <= LONGEST else None
            if isinstance(record, dict) and record.keys() == {"dropped", "time"}:
                dropped += int(record["dropped"])
                continue
            keys = set(record) if isinstance(record, dict) else set()
            later = not {"input", "output"} & keys and {"correction", "consent"} & keys
            known = lines.get(record.get("request_id")) if later else None
            line = LogLine.model_validate({**known.model_dump(), **{k: record[k] for k in later}} if known else record)
        except ValidationError as error:
            reason = "completes a request that does not stand before it" if later else explain(error)
            problems.append((place, f"longer than {LONGEST:,} bytes" if len(raw) > LONGEST else reason))
            continue
        except (ValueError, TypeError, RecursionError) as error:
            bytes_wrong = isinstance(error, UnicodeDecodeError)
            problems.append((place, "not UTF-8" if bytes_wrong else "not JSON, torn in writing?"))
            continue
        first = known or lines.setdefault(line.request_id, line)
        if (first.input, first.output) != (line.input, line.output):
            problems.append((place, "its request_id is that of an earlier line with another text; give each its own"))
            continue
        if first is not line and not known:  # written twice: a correction is kept, consent once refused stays refused
            repeated += 1
            facts = {"correction": first.correction or line.correction, "consent": first.consent and line.consent}
            line = first.model_copy(update=facts)
        lines[line.request_id] = line
        if not known:
            ignored.update(n if n.isidentifier() else "(no name)" for n in record if n not in LogLine.model_fields)
            if last and last - line.time > CLOCK:
                hours = (last - line.time).total_seconds() / 3600
                clock.append((place, f"its time lies {hours:.1f} hours before the line above"))
            last = line.time
    if problems and not lines:
        raise SlmError(f"{Path(path).parent / problems[0][0]}: {problems[0][1]}; no line of this file is a log line.")
    kept = [line for line in lines.values() if line.consent]
    mute = [one.model_copy(update={"input": "", "output": "?" * bool(one.output), "correction": None}) for one in lines.values()]
    every = [one if one.consent else silent for one, silent in zip(lines.values(), mute, strict=True)]
    return Logs(kept, problems, read, len(lines) - len(kept), repeated, dropped, clock, dict(ignored), every)


def _lines(files: list[Path]) -> Iterator[tuple[str, bytes]]:
    """file:line and the bytes of each line that holds any; of an overlong one only its beginning."""
    for file in files:
        with file.open("rb") as stream:
            number = 0
            while raw := stream.readline(LONGEST + 1):
                number, part = number + 1, raw
                while not part.endswith(b"\n") and (part := stream.readline(LONGEST)):
                    pass
                raw = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
                if raw.strip():
                    yield f"{file.name}:{number}", raw
