"""Tolerant reading: every line of a batch becomes a candidate, readable or not; none is lost."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from slm.errors import SlmError
from slm.rows import Row, explain, from_any


@dataclass(frozen=True)
class Verdict:
    """Why a row was refused: the gate, a reason in words, and what proves it."""

    gate: str
    reason: str
    evidence: dict


@dataclass(frozen=True)
class Candidate:
    """One line of a file: its row, or the verdict that says why there is none."""

    file: str
    line: int
    raw: str
    row: Row | None = None
    verdict: Verdict | None = None

    @property
    def place(self) -> str:
        """file:line."""
        return f"{self.file}:{self.line}"

    def refuse(self, verdict: Verdict) -> "Candidate":
        """The same candidate with a verdict."""
        return replace(self, verdict=verdict)

    def record(self) -> dict:
        """What data/rejected keeps."""
        found = {"gate": self.verdict.gate, "reason": self.verdict.reason, "evidence": self.verdict.evidence}
        found |= {"file": self.file, "line": self.line}
        return found | ({"row": self.row.model_dump(exclude_none=True)} if self.row else {"raw": self.raw})


def read_candidates(path: Path, name: str = "") -> Iterator[Candidate]:
    """The candidates of a JSONL file; empty lines are skipped. Raises SlmError only when the file is missing."""
    path = Path(path)
    if not path.is_file():
        raise SlmError(f"{path}: there is no such file.")
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield _candidate(name or str(path), number, line)


def _candidate(name: str, number: int, line: bytes) -> Candidate:
    raw = line.decode("utf-8-sig" if number == 1 else "utf-8", errors="replace").rstrip("\r\n")
    candidate, place = Candidate(name, number, raw), {"file": name, "line": number}
    try:
        line.decode("utf-8")
        record = json.loads(raw)
        if not isinstance(record, dict):
            raise ValueError("a line must be a JSON object")
        return replace(candidate, row=from_any(record, category="all"))
    except UnicodeDecodeError:
        return candidate.refuse(Verdict("json_validity", "not UTF-8", place))
    except (json.JSONDecodeError, RecursionError) as error:
        return candidate.refuse(Verdict("json_validity", f"not JSON: {error}", place))
    except (ValueError, TypeError) as error:
        return candidate.refuse(Verdict("schema_validity", explain(error), place))
