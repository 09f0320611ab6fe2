"""Tolerant reading: every line of a batch becomes a candidate, readable or not; none is lost."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from slm.contract import _no_constant, _no_twice
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
    """One line of a file: its row, or the verdict that says why there is none. `offset` is where the line begins."""

    file: str
    line: int
    raw: str
    row: Row | None = None
    verdict: Verdict | None = None
    offset: int = 0

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


@dataclass(frozen=True)
class Chunk:
    """Whole lines of a file: `size` bytes from `offset` on, the first of them line number `line`."""

    path: str
    name: str
    offset: int
    size: int
    line: int


def chunks(path: Path, name: str = "", size: int = 2_000_000) -> Iterator[Chunk]:
    """A file in chunks of about `size` bytes. Raises SlmError when the file is missing."""
    path = Path(path)
    if not path.is_file():
        raise SlmError(f"{path}: there is no such file.")
    with path.open("rb") as stream:
        offset, line = 0, 1
        while block := stream.read(size):
            block += stream.readline()
            yield Chunk(str(path), name or str(path), offset, len(block), line)
            offset, line = offset + len(block), line + block.count(b"\n")


def read_chunk(chunk: Chunk) -> list[Candidate]:
    """The candidates of a chunk; empty lines are skipped."""
    with open(chunk.path, "rb") as stream:
        stream.seek(chunk.offset)
        lines = stream.read(chunk.size).split(b"\n")
    found, offset = [], chunk.offset
    for number, line in enumerate(lines, chunk.line):
        if line.strip():
            found.append(_candidate(chunk.name, number, line, offset))
        offset += len(line) + 1
    return found


def read_candidates(path: Path, name: str = "") -> Iterator[Candidate]:
    """The candidates of a JSONL file; empty lines are skipped. Raises SlmError only when the file is missing."""
    for chunk in chunks(path, name):
        yield from read_chunk(chunk)


def _candidate(name: str, number: int, line: bytes, offset: int) -> Candidate:
    raw = line.decode("utf-8-sig" if number == 1 else "utf-8", errors="replace").rstrip("\r")
    candidate, place = Candidate(name, number, raw, offset=offset), {"file": name, "line": number}
    try:
        line.decode("utf-8")
        record = json.loads(raw, object_pairs_hook=_no_twice, parse_constant=_no_constant, parse_float=_finite)
    except UnicodeDecodeError:
        return candidate.refuse(Verdict("json_validity", "not UTF-8", place))
    except (ValueError, RecursionError) as error:
        return candidate.refuse(Verdict("json_validity", f"not JSON: {error}", place))
    try:
        row = from_any(record, category="all")
        row.model_dump_json()  # what cannot be written (half a surrogate pair, endless nesting) is no row
    except (ValueError, TypeError, RecursionError) as error:
        return candidate.refuse(Verdict("schema_validity", explain(error)[:500], place))
    return replace(candidate, row=row)


def _finite(text: str) -> float:
    if (value := float(text)) in (float("inf"), float("-inf")):
        raise ValueError(f"{text[:20]} is too large")
    return value
