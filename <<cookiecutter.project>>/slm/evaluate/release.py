"""The release gates, each with its value, threshold and failing rows; refusals; and the record of a release."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from slm import registry
from slm.contract import Contract
from slm.errors import SlmError
from slm.evaluate.candidate import load_candidate, scores_file
from slm.evaluate.metrics import Result, cost_per_1k
from slm.evaluate.scorers import Score, row_metric
from slm.rows import iter_rows, read_rows

# The metrics that gate a task type. Bounds: settings.gates, under the same names; else the contract's target.
BY_TYPE = {
    "extraction": ("record_parse_rate", "field_f1", "critical_field_accuracy"),
    "tool_calling": ("tool_name_accuracy", "required_argument_accuracy", "json_parse_rate", "unsafe_tool_call_rate"),
    "classification": ("macro_f1", "false_positive_rate", "false_negative_rate"),
}
AT_MOST = ("false_positive_rate", "false_negative_rate", "unsafe_tool_call_rate")


class Gate(BaseModel):
    """One rule of the release. `rows` are the ids of the rows that count against it. A gate that was not run does not
    count as passed."""

    model_config = ConfigDict(extra="forbid")
    name: str
    rule: str
    measured: str
    status: Literal["pass", "fail", "not run"]
    note: str = ""
    value: float | None = None
    threshold: float | None = None
    rows: list[str] = []

    @property
    def detail(self) -> str:
        """The rule, what was measured, and for a failed gate the first rows, on one line."""
        more = f" and {len(self.rows) - 5} more" if len(self.rows) > 5 else ""
        named = f"rows {', '.join(self.rows[:5])}{more}" if self.rows and self.status == "fail" else ""
        notes = "; ".join(part for part in (self.note, named) if part)
        return f"{self.rule}: {self.measured}{f' ({notes})' if notes else ''}"


def check(settings, run_id: str) -> list[Gate]:
    """All gates of a run, from its evaluation report and today's registry. Raises SlmError without a report, when a
    locked evaluation set has changed, when the model was trained again since, or when it was trained on an evaluation
    row."""
    report = load_report(settings, run_id)
    locked = registry.check_locked(settings)
    for name, facts in report["sets"].items():
        if facts["hash"] != locked[name]:
            raise SlmError(f"run {run_id} was evaluated on another data/eval/{name}.jsonl; run 06_evaluate again.")
    train = registry.latest(settings, "runs", stage="train", status="completed", run_id=run_id)
    if train and train["parents"].get("dataset") != report["dataset_version"]:
        raise SlmError(
            f"run {run_id}: its report is about dataset version {report['dataset_version'] or '(none)'}, its adapter is now "
            f"trained on {train['parents'].get('dataset') or '(none)'}; run 06_evaluate again."
        )
    _refuse_leaks(settings)
    return gates(settings, report)


def gates(settings, report: dict) -> list[Gate]:
    """The default gates, then those of the task type, for an evaluation report."""
    own = [_metric(settings, report, name) for name in BY_TYPE.get(report["contract"]["task_type"], ())]
    if report["contract"]["task_type"] == "classification":
        own.append(_calibration(settings, report))
    return [*_default(settings, report), *own, *_papers(settings, report)]


def failures(found: list[Gate]) -> list[Gate]:
    """The gates that keep a model from release: failed and not run."""
    return [gate for gate in found if gate.status != "pass"]


def failed_rows(scores: Sequence[Score], contract: Contract) -> dict[str, list[str]]:
    """{gated metric: ids of the rows that count against it}, and under "critical" the rows with a critical field
    wrong."""
    found = {"critical": [s.row_id for s in scores if not s.critical_ok]}
    for name in (contract.primary_metric, "schema_validity", *BY_TYPE.get(contract.task_type, ())):
        fine = (None, 0.0 if name in AT_MOST else 1.0)
        found[name] = [s.row_id for s in scores if row_metric(name)(s, contract) not in fine]
    return found


def load_report(settings, run_id: str) -> dict:
    """outputs/eval_reports/<run_id>/eval_report.json. Raises SlmError when 06 was not run for this run."""
    file = report_file(settings, run_id)
    if not file.is_file():
        raise SlmError(f"{file}: run {run_id} has no evaluation report; run 06_evaluate first.")
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SlmError(f"{file}: not JSON ({error}); run 06_evaluate again.") from None
    if not isinstance(report, dict) or "failed_rows" not in report:
        raise SlmError(f"{file}: written by an older release of the template; run 06_evaluate again.")
    return report


def report_file(settings, run_id: str) -> Path:
    """outputs/eval_reports/<run_id>/eval_report.json."""
    return settings.path(f"outputs/eval_reports/{run_id}/eval_report.json")


def sign_off(settings, run_id: str, reviewer: str) -> dict:
    """Record that a named person has read the evaluation report as it stands; a changed report asks for it again."""
    if not reviewer.strip():
        raise SlmError("a review needs the reviewer's name.")
    load_report(settings, run_id)
    file = report_file(settings, run_id)
    record = {"stage": "review", "run_id": run_id, "reviewer": reviewer.strip(), "report": registry.file_hash(file)}
    return registry.append(settings, "runs", record)


def last_released(settings, run_id: str) -> dict | None:
    """The newest release of another run."""
    records = [r for r in registry.read(settings, "runs") if r.get("stage") == "release" and r["run_id"] != run_id]
    return records[-1] if records else None


def golden_diff(settings, run_id: str, released: dict) -> dict[str, list[str]]:
    """Golden rows that a run has fixed and broken against a released one, by exact match, the adapters compared.
    Raises SlmError when set, contract or rows are not the same, or when the released run's scores have changed."""
    then, old = released["run_id"], scores_file(settings, released["run_id"])
    if not old.is_file() or registry.file_hash(old) != released["scores"]:
        raise SlmError(f"{old}: missing, or not what was released; no diff on golden against run {then}.")
    a, b = (
        next((r for r in load_candidate(settings, name) if (r.set, r.name) == ("golden", "fine_tuned")), None)
        for name in (run_id, then)
    )
    if a is None or b is None:
        raise SlmError(f"run {run_id if a is None else then}: no scores on golden; run 06_evaluate again.")
    for what, x, y in (("golden.jsonl", a.set_hash, b.set_hash), ("contract", a.contract_hash, b.contract_hash)):
        if x != y:
            raise SlmError(f"another {what}: {x[:12]} in run {run_id}, {y[:12]} in run {then}; they do not compare.")
    was = {s.row_id: s.exact for s in b.scores}
    if was.keys() != {s.row_id for s in a.scores}:
        raise SlmError(f"other golden rows in run {run_id} ({len(a.scores)}) than in run {then} ({len(was)}).")
    return {
        "fixed": [s.row_id for s in a.scores if s.exact and not was[s.row_id]],
        "broken": [s.row_id for s in a.scores if was[s.row_id] and not s.exact],
    }


def release(settings, run_id: str, found: list[Gate]) -> dict:
    """Record the release of a run whose gates `found` all passed, with the hashes of all that it rests on; the same
    release is recorded once. Raises SlmError for an open gate, for sets of which only a part was evaluated, and for an
    exported file that is not what 08 proved."""
    if failed := [gate.name for gate in failures(found)]:
        raise SlmError(f"run {run_id} is not released; not passed: {', '.join(failed)}.")
    report = load_report(settings, run_id)
    for name, facts in report["sets"].items():
        if facts["n"] != (whole := len(read_rows(settings.path(f"data/eval/{name}.jsonl")))):
            raise SlmError(
                f"run {run_id} was evaluated on {facts['n']} of {whole} rows of {name} (evaluate.limit); a release needs "
                "them all: run 02_baseline and 06_evaluate without the limit."
            )
    exported = registry.latest(settings, "runs", stage="export", status="completed", run_id=run_id) or {"files": {}}
    for name, known in exported["files"].items():
        file = settings.path(f"outputs/gguf/{run_id}/{name}")
        if file.suffix == ".gguf" and (not file.is_file() or registry.file_hash(file) != known):
            raise SlmError(f"{file}: missing, or not the file that was proven; run 08_export again.")
    before, card = last_released(settings, run_id), settings.path(f"outputs/eval_reports/{run_id}/model_card.md")
    record = {
        "stage": "release", "run_id": run_id, "previous": before and before["run_id"], "verdict": report["verdict"],
        "dataset_version": report["dataset_version"], "model": report["model"], "contract": report["contract"]["hash"],
        "chosen": chosen(settings, run_id), "files": exported["files"], "gates": {g.name: g.measured for g in found},
        "sets": {name: facts["hash"] for name, facts in report["sets"].items()},
        "report": registry.file_hash(report_file(settings, run_id)), "card": registry.file_hash(card),
        "scores": registry.file_hash(scores_file(settings, run_id)),
        "reviewer": registry.latest(settings, "runs", stage="review", run_id=run_id)["reviewer"],
    }  # fmt: skip
    known = registry.latest(settings, "runs", stage="release", run_id=run_id)
    if known and all(known[key] == record[key] for key in ("report", "card", "files", "previous")):
        return known
    return registry.append(settings, "runs", record)


def other_seeds(settings, run_id: str) -> list[str]:
    """The other runs of the same recipe, rows, contract and base that differ in train.seed alone, by run id."""
    runs = {
        r["run_id"]: r for r in registry.read(settings, "runs")
        if r.get("stage") == "train" and r["status"] == "completed"
    }  # fmt: skip
    if run_id not in runs:
        return []

    def same(run: dict) -> tuple:
        return {**run["recipe"], "seed": None}, run["parents"], run["method"], run["trainer"]

    mine = runs[run_id]
    found = [n for n, r in runs.items() if same(r) == same(mine) and r["recipe"]["seed"] != mine["recipe"]["seed"]]
    return sorted(found)


def chosen(settings, run_id: str) -> str | None:
    """The quant that 08 chose to ship, or None before 08."""
    file = settings.path(f"outputs/gguf/{run_id}/export.json")
    return json.loads(file.read_text(encoding="utf-8"))["chosen"] if file.is_file() else None


def _refuse_leaks(settings) -> None:
    """Refuse a training row that says word for word what an evaluation row says."""

    def plain(row) -> str:
        return " ".join(row.user.lower().split())

    files = {name: settings.path(f"data/eval/{name}.jsonl") for name in registry.SETS}
    known = {plain(row): f"row {row.id} of data/eval/{name}.jsonl" for name, f in files.items() for row in read_rows(f)}
    train = settings.path("data/accepted/train.jsonl")
    for row in iter_rows(train) if train.is_file() else ():
        if twin := known.get(plain(row)):
            raise SlmError(
                f"data/accepted/train.jsonl: row {row.id} is {twin}; what it scores there is memory. "
                "Run 04_curate, 05_train and 06_evaluate again."
            )


def _judged(settings, report: dict, set: str) -> dict[str, dict]:
    """What is released, where it answered a set: the adapter, and the exported file that 08 chose."""
    results = report["results"].get(set, {})
    names = ("fine_tuned", chosen(settings, report["run_id"]))
    return {name: results[name] for name in names if results.get(name, {}).get("metrics")}


def _gate(name: str, rule: str, ok: bool | None, measured: str = "", note: str = "", **facts) -> Gate:
    status = "not run" if ok is None else "pass" if ok else "fail"
    return Gate(name=name, rule=rule, measured=measured or "-", status=status, note=note, **facts)


def _metric(settings, report: dict, metric: str, primary: bool = False) -> Gate:
    """The gate on one metric, of the adapter and of the file that ships: both must hold."""
    set = "adversarial" if metric == "unsafe_tool_call_rate" else report["headline_set"]
    target, most = report["contract"]["target"], metric in AT_MOST
    bound = target if primary else settings.gates.model_dump().get(metric, target)
    percent = f"{100 * bound:g}%" if bound and metric in settings.gates.model_dump() and not primary else f"{bound:g}"
    sign = "==" if most and bound == 0 else "<=" if most else ">="
    name, title = ("primary_metric", f"primary_metric ({metric})") if primary else (metric, metric)
    rule = f"{title} {sign} {percent}" + (" on adversarial" if set == "adversarial" else "")
    found = {who: r["metrics"][metric] for who, r in _judged(settings, report, set).items() if metric in r["metrics"]}
    if "fine_tuned" not in found:
        return _gate(name, rule, None, note="no row of this kind was evaluated", threshold=bound)
    worst = (max if most else min)(found, key=lambda who: found[who]["value"])
    value = found[worst]["value"]
    told = [
        f"{'' if who == 'fine_tuned' else who + ' '}{m['value']:.3f} [{m['low']:.3f}, {m['high']:.3f}]"
        for who, m in found.items()
    ]
    looks = report["sets"][set].get("looks", 0)
    note = {"test": f"look number {looks} at test"}.get(set, "test was not opened") if primary else ""
    return _gate(
        name, rule, value <= bound if most else value >= bound, f"{', '.join(told)} on {set}, n={found[worst]['n']}", note,
        value=value, threshold=bound, rows=report["failed_rows"][set][worst].get(metric, []),
    )  # fmt: skip


def _default(settings, report: dict) -> list[Gate]:
    return [
        _metric(settings, report, report["contract"]["primary_metric"], primary=True),
        _metric(settings, report, "schema_validity"), _golden(settings, report), *_running(settings, report),
        _safety(report),
    ]  # fmt: skip


def _golden(settings, report: dict) -> Gate:
    """Rows of golden with a critical field wrong, in the adapter or in the file that ships; and what changed against
    the last released run."""
    limit, run_id, judged = settings.gates.critical_failures, report["run_id"], _judged(settings, report, "golden")
    rule, before = f"critical failures on golden {'<=' if limit else '=='} {limit}", last_released(settings, run_id)
    if "fine_tuned" not in judged:
        return _gate("regression_on_golden_set", rule, None, threshold=limit)
    wrong = {who: report["failed_rows"]["golden"][who]["critical"] for who in judged}
    worst = max(wrong, key=lambda who: len(wrong[who]))
    note = "first release: nothing to compare with"
    if before:
        try:
            diff = golden_diff(settings, run_id, before)
            note = f"against released run {before['run_id']}: " + ", ".join(
                f"{len(ids)} {what}{' (' + ' '.join(ids) + ')' if ids else ''}" for what, ids in diff.items()
            )
        except SlmError as error:
            note = str(error)
    n, count = judged[worst]["metrics"]["exact_match"]["n"], len(wrong[worst])
    told = f"{count} of {n} rows" + ("" if worst == "fine_tuned" else f" ({worst})")
    return _gate("regression_on_golden_set", rule, count <= limit, told, note, value=count, threshold=limit, rows=wrong[worst])


def _running(settings, report: dict) -> list[Gate]:
    """Latency and cost of the file that ships, where 08 timed it; else of the adapter, which the note says."""
    target, most, money = settings.task.target_latency_ms / 1000, settings.task.target_cost_per_1k, settings.cost.currency
    timed = {who: r for who, r in _judged(settings, report, "dev").items() if r["latency_p95_s"] is not None}
    who = list(timed)[-1] if timed else ""
    note = "the adapter; 08 times the exported files" if who == "fine_tuned" else f"{who}, the file that ships"
    wait = timed[who]["latency_p95_s"] if timed else None
    price = cost_per_1k(settings, Result.model_validate(timed[who])) if timed else None
    ask = "say what the machine that answers costs: cost.serving_hourly_rate in project.yaml, 0 if nothing more"
    return [
        _gate("latency", f"p95 <= {target:g} s", wait <= target if timed else None, f"{wait:.2f} s" if timed else "",
              note if timed else "no lone request was timed", value=wait, threshold=target),
        _gate("cost", f"<= {most:g} {money} per 1,000 requests", None if price is None else price <= most,
              "" if price is None else f"{price:.4f} {money}", ask if price is None else note, value=price, threshold=most),
    ]  # fmt: skip


def _safety(report: dict) -> Gate:
    found = report["comparisons"].get("adversarial", {})
    pairs = {k: found[k] for k in ("base", "prompted_base") if k in found}
    worse = [pair for pair in pairs.values() if pair["difference"]["high"] < 0]
    return _gate(
        "no_severe_safety_regression",
        "no severe safety regression: on adversarial, not worse than the base or the prompted base",
        not worse if pairs else None,
        "; ".join(f"{pair['difference']['value']:+.3f} against {k}" for k, pair in pairs.items()),
        rows=sorted({row for pair in worse for row in pair["broken"]}),
    )


def _calibration(settings, report: dict) -> Gate:
    most, set = settings.gates.calibration_error, report["headline_set"]
    found = {who: r["calibration"] for who, r in _judged(settings, report, set).items() if r["calibration"].get("n")}
    rule = f"calibration checked: expected calibration error <= {most:g}"
    if "fine_tuned" not in found:
        return _gate("calibration", rule, None, note="the answers carry no token probabilities", threshold=most)
    who = max(found, key=lambda name: found[name]["ece"])
    ece, told = found[who]["ece"], "" if who == "fine_tuned" else f"{who} "
    return _gate("calibration", rule, ece <= most, f"{told}{ece:.3f} on {set}, n={found[who]['n']}", value=ece, threshold=most)


def _papers(settings, report: dict) -> list[Gate]:
    run_id, version = report["run_id"], report["dataset_version"]
    file, card = report_file(settings, run_id), settings.path(f"outputs/eval_reports/{run_id}/model_card.md")
    review = registry.latest(settings, "runs", stage="review", run_id=run_id)
    written = registry.latest(settings, "runs", stage="evaluate", run_id=run_id)
    now = registry.file_hash(file) if file.is_file() else ""
    problem = "" if review else "`python -m slm review <run> --by NAME`"
    if review and review["report"] != now:
        problem = "the report changed after its review"
    elif review and written and now not in written["artefacts"].values():
        problem = "the report was edited by hand; run 06_evaluate again"
    recorded = bool(version) and registry.latest(settings, "datasets", version=version) is not None
    return [
        _gate("eval_report_reviewed", "eval report reviewed", not problem, "no" if problem else f"by {review['reviewer']}", problem),
        _gate("model_card_written", "model card written", card.is_file(), "yes" if card.is_file() else "no",
              "" if card.is_file() else "08_export writes it"),
        _gate("dataset_version_recorded", "dataset version recorded", recorded, version or "no",
              "" if recorded else "not in registry/datasets.jsonl; 04_curate records it"),
    ]  # fmt: skip
