"""What 07 reads: rows and scores of a run on dev, reports of single evaluations, the labels trained on."""

import json
from collections import Counter
from pathlib import Path

from slm.contract import Contract
from slm.errors import SlmError
from slm.evaluate.candidate import NAME, load_candidate
from slm.evaluate.metrics import Result
from slm.evaluate.scorers import Score
from slm.rows import Row, explain, read_rows


def load_failures(settings, contract: Contract) -> list[tuple[Row, Score]]:
    """The fine-tuned model's rows and scores on dev. Golden, adversarial and test decide about release: not repaired
    on. Raises SlmError when 06 was not run for that run."""
    results = [r for r in load_candidate(settings, settings.run_id) if (r.set, r.name) == ("dev", NAME)]
    if not results:
        raise SlmError(f"run {settings.run_id}: no scores on dev; run 06_evaluate first.")
    return with_rows(settings, results[0])


def with_rows(settings, result: Result) -> list[tuple[Row, Score]]:
    """Scores beside their rows of data/eval/<set>.jsonl. Raises SlmError for a score whose row is gone."""
    file = f"data/eval/{result.set}.jsonl"
    rows = {row.id: row for row in read_rows(settings.path(file))}
    gone = [s.row_id for s in result.scores if s.row_id not in rows]
    if gone:
        raise SlmError(f"{file}: row {gone[0]} was scored and is not there any more; evaluate again.")
    return [(rows[s.row_id], s) for s in result.scores]


def read_report(path: Path) -> Result:
    """A result with its scores, as `scripts/run_eval.py` and 06 write it; of several, the one on dev. Raises SlmError
    when the file is missing, is not such a report, or holds no scores."""
    path = Path(path)
    if not path.is_file():
        raise SlmError(f"{path}: there is no such file; run scripts/run_eval.py first.")
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        found = [Result.model_validate(r) for r in (body if isinstance(body, list) else [body])]
    except ValueError as error:  # pydantic's errors are ValueErrors too
        raise SlmError(f"{path}: not an evaluation report with scores ({explain(error)}).") from None
    found = [r for r in found if r.scores]
    if not found:
        raise SlmError(f"{path}: it holds no scores, so there is nothing to analyse.")
    return next((r for r in found if r.set == "dev"), found[0])


def trained_labels(settings) -> dict[str, int] | None:
    """Training rows by label, or None before 04 was run."""
    path = settings.path("data/accepted/train.jsonl")
    return Counter(row.meta.category for row in read_rows(path)) if path.is_file() else None
