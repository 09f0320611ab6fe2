"""Single steps of curation, for the scripts: one file validated, one file freed of duplicates."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from slm.curate import duplicates
from slm.curate.gates import checked, read_answer
from slm.curate.read import Candidate, Verdict, read_candidates
from slm.curate.text import band_keys, hash64, sketch, text_of, words
from slm.errors import SlmError
from slm.rows import Row


def validate(path: Path, contract, checks: list[Callable] = ()) -> list[Candidate]:
    """Every line of a file with its verdict: row format, answer, unique ids, the user's checks."""
    found, first = [], {}
    for c in read_candidates(path):
        verdict, value = read_answer(c.row.answer, contract) if c.row else (c.verdict, None)
        twin = first.setdefault(c.row.id, c.place) if c.row else c.place
        if verdict is None and twin != c.place:
            verdict = Verdict("schema_validity", f"its id {c.row.id} is already that of {twin}", {"id": c.row.id})
        verdict = verdict or checked(c.row, value, checks)
        found.append(c.refuse(verdict) if verdict else c)
    return found


def dedupe(settings, path: Path, against: Path | None = None) -> tuple[list[Row], list[tuple[Row, Verdict]]]:
    """The rows of a file that are duplicates neither of each other nor of rows `against`, and those that are. Rows with
    the id of a known row are not compared with it: after 04 the accepted rows are the batch's own. Unreadable lines
    raise SlmError: validate first."""
    rows, cfg = _readable(path), settings.curate
    own = {row.id for row in rows}
    if against and not Path(against).exists():
        raise SlmError(f"{against}: there is no such file or folder.")
    files = [] if not against else sorted(Path(against).glob("*.jsonl")) if Path(against).is_dir() else [against]
    known = list({row.id: row for file in files for row in _readable(file) if row.id not in own}.values())
    every = [*known, *rows]
    texts, number = {n: text_of(row) for n, row in enumerate(every)}, np.arange(len(every))
    made = sketch([words(text) for text in texts.values()])
    bands = ((number, keys) for keys in band_keys(made, cfg.near_duplicate).T)
    near = duplicates.near_edges(bands, number, made.matrix(), cfg.near_duplicate)
    facts = np.zeros(len(every), duplicates.ROW)
    facts["text"], facts["value"] = made.text, [hash64(row.answer) for row in every]
    facts["near_miss"], facts["spared"] = [row.meta.kind == "near_miss" for row in every], number < len(known)
    contrast = {n: row.meta.provenance["contrast_of"] for n, row in enumerate(every) if "contrast_of" in row.meta.provenance}
    table = duplicates.Table(facts, [row.id for row in every], np.ones(len(every), bool), contrast)
    verdicts: dict[int, Verdict] = {}
    duplicates.duplicates(table, duplicates.join(table, near, duplicates.cosine_edges(texts, number, cfg.semantic_duplicate)), verdicts)
    kept = [row for n, row in enumerate(rows, len(known)) if n not in verdicts]
    return kept, [(every[n], verdicts[n]) for n in sorted(verdicts)]


def _readable(path: Path) -> list[Row]:
    candidates = list(read_candidates(path))
    for c in candidates:
        if c.verdict:
            hint = f"run scripts/validate_jsonl.py {path} and mend the file first"
            raise SlmError(f"{c.place}: {c.verdict.reason}; {hint}.")
    return [c.row for c in candidates]
