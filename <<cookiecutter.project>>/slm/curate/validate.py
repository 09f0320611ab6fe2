"""Single steps of curation, for the scripts: one file validated, one file freed of duplicates."""

from collections.abc import Callable
from pathlib import Path

from slm.curate.duplicates import duplicates
from slm.curate.gates import checked, read_answers
from slm.curate.read import Candidate, Verdict, read_candidates
from slm.curate.text import pairs_of
from slm.errors import SlmError
from slm.rows import Row


def validate(path: Path, contract, checks: list[Callable] = ()) -> list[Candidate]:
    """Every line of a file with its verdict: row format, answer, unique ids, the user's checks."""
    found = list(read_candidates(path))
    readable = [n for n, c in enumerate(found) if c.verdict is None]
    verdicts, values = read_answers([found[n].row for n in readable], contract)
    first: dict[str, str] = {}
    for n, verdict, value in zip(readable, verdicts, values, strict=True):
        row, place = found[n].row, found[n].place
        twin = first.setdefault(row.id, place)
        if verdict is None and twin != place:
            verdict = Verdict("schema_validity", f"its id {row.id} is already that of {twin}", {"id": row.id})
        if verdict is None:
            verdict = checked([row], [value], list(checks))[0]
        if verdict:
            found[n] = found[n].refuse(verdict)
    return found


def dedupe(settings, path: Path, against: Path | None = None) -> tuple[list[Row], list[tuple[Row, Verdict]]]:
    """The rows of a file that are duplicates neither of each other nor of rows `against`, and those that are. Rows with
    the id of a known row are not compared with it: after 04 the accepted rows are the batch's own. Unreadable lines
    raise SlmError: validate first."""
    rows = _readable(path)
    own = {row.id for row in rows}
    if against and not Path(against).exists():
        raise SlmError(f"{against}: there is no such file or folder.")
    files = [] if not against else sorted(Path(against).glob("*.jsonl")) if Path(against).is_dir() else [against]
    known = list({row.id: row for file in files for row in _readable(file) if row.id not in own}.values())
    everything = [*known, *rows]
    pairs = pairs_of(everything, settings.curate.near_duplicate, settings.curate.semantic_duplicate, len(known))
    verdicts = duplicates(everything, [row.answer for row in everything], pairs, len(known))[len(known) :]
    found = list(zip(rows, verdicts, strict=True))
    return [row for row, verdict in found if verdict is None], [pair for pair in found if pair[1]]


def _readable(path: Path) -> list[Row]:
    candidates = list(read_candidates(path))
    for c in candidates:
        if c.verdict:
            hint = f"run scripts/validate_jsonl.py {path} and mend the file first"
            raise SlmError(f"{c.place}: {c.verdict.reason}; {hint}.")
    return [c.row for c in candidates]
