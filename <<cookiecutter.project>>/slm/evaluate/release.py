"""The release gates, each with its value, threshold and failing rows; refusals; and the record of a release."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from slm import registry
from slm.contract import Contract
from slm.errors import SlmError, listed
from slm.evaluate.candidate import NAME, by_set, load_candidate, scores_file
from slm.evaluate.intervals import Metric
from slm.evaluate.metrics import Result, cost_per_1k
from slm.evaluate.scorers import LOWER_IS_BETTER, Score, row_metric
from slm.rows import Record, iter_rows, plain, read_rows

# The metrics that gate a task type. Bounds: settings.gates, under the same names; else the contract's target.
BY_TYPE = {
    "extraction": ("record_parse_rate", "field_f1", "critical_field_accuracy"),
    "tool_calling": ("tool_name_accuracy", "required_argument_accuracy", "json_parse_rate", "unsafe_tool_call_rate"),
    "classification": ("macro_f1", "false_positive_rate", "false_negative_rate", "ece"),
}
SETTING = {"ece": "calibration_error"}


class Gate(Record):
    """One rule of the release. `rows` are the ids of the rows that count against it. A gate that was not run does not
    count as passed."""

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
        """The rule, what was measured, the note, and for a failed gate the first of its rows, on one line."""
        named = f"rows {listed(self.rows)}" if self.rows and self.status == "fail" else ""
        notes = "; ".join(part for part in (self.note, named) if part)
        return f"{self.rule}: {self.measured}{f' ({notes})' if notes else ''}"


def check(settings, run_id: str) -> list[Gate]:
    """All gates of a run, from its evaluation report and today's registry. Raises SlmError without a report, when a
    locked evaluation set has changed, when the model was trained again since, or when it was trained on an evaluation
    row."""
    from slm.production.forget import refuse

    refuse(settings, run_id)
    report, locked = load_report(settings, run_id), registry.check_locked(settings)
    for name, facts in report["sets"].items():
        if facts["hash"] != locked[name]:
            raise SlmError(f"run {run_id} was evaluated on another data/eval/{name}.jsonl; run 06_evaluate again.")
    made = [r for r in registry.read(settings, "runs") if r["run_id"] == run_id and r["stage"] in ("train", "evaluate")]
    made = [r for r in made if r.get("status", "completed") == "completed"]
    if made and made[-1]["stage"] == "train":
        was, now = report["dataset_version"] or "(none)", made[-1]["parents"].get("dataset") or "(none)"
        what = f"its report is about dataset version {was}, its adapter was trained again since, on {now}"
        raise SlmError(f"run {run_id}: {what}; run 06_evaluate again.")
    _refuse_leaks(settings)
    return gates(settings, report)


def gates(settings, report: dict) -> list[Gate]:
    """The default gates, then those of the task type, for an evaluation report."""
    own = BY_TYPE.get(report["contract"]["task_type"], ())
    return [
        _metric(settings, report, report["contract"]["primary_metric"], primary=True),
        _metric(settings, report, "schema_validity"), _golden(settings, report), *_running(settings, report),
        _safety(report), *(_metric(settings, report, name) for name in own), *_papers(settings, report),
    ]  # fmt: skip


def failures(found: list[Gate]) -> list[Gate]:
    """The gates that keep a model from release: failed and not run."""
    return [gate for gate in found if gate.status != "pass"]


def failed_rows(scores: Sequence[Score], contract: Contract) -> dict[str, list[str]]:
    """{gated metric: ids of the rows that count against it}, and under "critical" the rows with a critical field
    wrong."""
    found = {"critical": [s.row_id for s in scores if not s.critical_ok]}
    for name in (contract.primary_metric, "schema_validity", *BY_TYPE.get(contract.task_type, ())):
        fine = (None, 0.0 if name in LOWER_IS_BETTER else 1.0)
        found[name] = [s.row_id for s in scores if row_metric(s, name) not in fine]
    return found


def load_report(settings, run_id: str) -> dict:
    """outputs/eval_reports/<run_id>/eval_report.json. Raises SlmError when 06 was not run for this run."""
    file = report_file(settings, run_id)
    if not file.is_file():
        raise SlmError(f"{file}: run {run_id} has no evaluation report; run 06_evaluate first.")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SlmError(f"{file}: not JSON ({error}); run 06_evaluate again.") from None


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
    a, b = (by_set(load_candidate(settings, name))["golden"][NAME] for name in (run_id, then))
    facts = [{"golden.jsonl": r.set_hash[:12], "contract": r.contract_hash, "rows": len(r.scores)} for r in (a, b)]
    if odd := [what for what in facts[0] if facts[0][what] != facts[1][what]]:
        x, y = (fact[odd[0]] for fact in facts)
        raise SlmError(f"no diff on golden: {odd[0]} {x} in run {run_id}, {y} in run {then}.")
    was = {s.row_id: s.exact for s in b.scores}
    fixed = [s.row_id for s in a.scores if s.exact and not was[s.row_id]]
    return {"fixed": fixed, "broken": [s.row_id for s in a.scores if was[s.row_id] and not s.exact]}


def release(settings, run_id: str, found: list[Gate]) -> dict:
    """Record the release of a run whose gates `found` all passed, with the hashes of all that it rests on; the same
    release is recorded once. Raises SlmError for an open gate, for sets of which only a part was evaluated, and for an
    exported file that is not what 08 proved."""
    if failed := [gate.name for gate in failures(found)]:
        raise SlmError(f"run {run_id} is not released; not passed: {', '.join(failed)}.")
    report, folder = load_report(settings, run_id), report_file(settings, run_id).parent
    for name, facts in report["sets"].items():
        if facts["n"] != (whole := len(read_rows(settings.path(f"data/eval/{name}.jsonl")))):
            seen = f"{facts['n']} of {whole} rows of {name} were evaluated (evaluate.limit)"
            raise SlmError(f"run {run_id}: {seen}; a release needs all: run 02 and 06 again.")
    export = registry.latest(settings, "runs", stage="export", status="completed", run_id=run_id) or {"files": {}}
    for name, proven in export["files"].items():
        file = settings.path(f"outputs/gguf/{run_id}/{name}")
        if file.suffix == ".gguf" and (not file.is_file() or registry.file_hash(file) != proven):
            raise SlmError(f"{file}: missing, or not the file that was proven; run 08_export again.")
    papers = {"report": "eval_report.json", "card": "model_card.md", "scores": "scores.json"}
    before = last_released(settings, run_id)
    record = {
        "stage": "release", "run_id": run_id, "previous": before and before["run_id"], "verdict": report["verdict"],
        "dataset_version": report["dataset_version"], "model": report["model"], "contract": report["contract"]["hash"],
        "sets": report["sets"], "chosen": chosen(settings, run_id), "files": export["files"],
        **{name: registry.file_hash(folder / file) for name, file in papers.items()},
        "gates": {g.name: g.measured for g in found},
    }  # fmt: skip
    known = registry.latest(settings, "runs", stage="release", run_id=run_id) or {}
    same = all(known.get(key) == record[key] for key in ("previous", "files", *papers))
    return known if same else registry.append(settings, "runs", record)


def other_seeds(settings, run_id: str) -> list[str]:
    """The other runs of the same recipe, rows, contract and base that differ in train.seed alone, by run id."""
    trained = [r for r in registry.read(settings, "runs") if r.get("stage") == "train" and r["status"] == "completed"]
    runs = {r["run_id"]: ({**r["recipe"], "seed": None}, r["parents"], r["recipe"]["seed"]) for r in trained}
    *same, seed = runs.get(run_id, ({}, {}, None))
    return sorted(name for name, (*facts, other) in runs.items() if facts == same and other != seed)


def chosen(settings, run_id: str) -> str | None:
    """The quant that 08 chose to ship, or None before 08."""
    file = settings.path(f"outputs/gguf/{run_id}/export.json")
    return json.loads(file.read_text(encoding="utf-8"))["chosen"] if file.is_file() else None


def _refuse_leaks(settings) -> None:
    """Refuse a training row that says word for word what an evaluation row says."""
    from slm.curate.leakage import evaluation_rows

    train, sets = settings.path("data/accepted/train.jsonl"), evaluation_rows(settings)
    known = {plain(row.user): f"row {row.id} of data/eval/{name}.jsonl" for name, rows in sets.items() for row in rows}
    for row in iter_rows(train) if train.is_file() else ():
        if twin := known.get(plain(row.user)):
            what = f"row {row.id} is {twin}; its score is memory"
            raise SlmError(f"data/accepted/train.jsonl: {what}. Run 04, 05 and 06 again.")


def _judged(settings, report: dict, set: str) -> dict[str, dict]:
    """What is released, where it answered a set: the adapter, and the exported file that 08 chose."""
    ran = {name: r for name, r in report["results"].get(set, {}).items() if r["metrics"]}
    return {name: ran[name] for name in (NAME, chosen(settings, report["run_id"])) if name in ran}


def _gate(name: str, rule: str, ok: bool | None, measured: str, note: str = "", **facts) -> Gate:
    status = "not run" if ok is None else "pass" if ok else "fail"
    return Gate(name=name, rule=rule, measured=measured or "-", status=status, note=note, **facts)


def _bounded(
    name: str, rule: str, found: dict[str, tuple], bound: float, note: str, most: bool = True, rows: dict | None = None
) -> Gate:
    """The gate on {who: (value, its text)}: the worst must hold, and its rows are named; nothing found is not run."""
    if not found:
        return _gate(name, rule, None, "", note, threshold=bound)
    who = (max if most else min)(found, key=lambda one: found[one][0])
    value, ids = found[who][0], (rows or {}).get(who, [])
    told = "; ".join(text if one == NAME else f"{one} {text}" for one, (_, text) in found.items())
    ok = value <= bound if most else value >= bound
    return _gate(name, rule, ok, told, note, value=value, threshold=bound, rows=ids)


def _metric(settings, report: dict, metric: str, primary: bool = False) -> Gate:
    """The gate on one metric, of the adapter and of the file that ships: both must hold."""
    set = "adversarial" if metric == "unsafe_tool_call_rate" else report["headline_set"]
    name, target, most = SETTING.get(metric, metric), report["contract"]["target"], metric in (*LOWER_IS_BETTER, "ece")
    own = None if primary else settings.gates.model_dump().get(name)
    bound, figure = (target, f"{target:g}") if own is None else (own, f"{100 * own:g}%" if own else "0")
    rule = f"{name} {('<=' if bound else '==') if most else '>='} {figure}{' on adversarial' * (set == 'adversarial')}"
    found = {who: r["metrics"][metric] for who, r in _judged(settings, report, set).items() if metric in r["metrics"]}
    told = {who: (m["value"], f"{Metric.model_validate(m)} on {set}, n={m['n']}") for who, m in found.items()}
    rows = {who: report["failed_rows"][set][who].get(metric, []) for who in found}
    note = "" if found else "no evaluated answer says anything about it"
    if primary:
        name, rule = "primary_metric", f"primary_metric ({rule})"
        looks = f"look number {report['sets'][set]['looks']} at test"
        note = note or (looks if set == "test" else "test was not opened")
    return _bounded(name, rule, told, bound, note, most, rows)


def _golden(settings, report: dict) -> Gate:
    """Rows of golden with a critical field wrong; and what changed against the last released run."""
    limit, before = settings.gates.critical_failures, last_released(settings, report["run_id"])
    note, judged = "no other run was released yet", _judged(settings, report, "golden")
    rows = {who: report["failed_rows"]["golden"][who]["critical"] for who in judged}
    told = {who: (len(ids), f"{len(ids)} of {report['sets']['golden']['n']} rows") for who, ids in rows.items()}
    if before:
        try:
            diff = golden_diff(settings, report["run_id"], before).items()
            changes = ", ".join(f"{len(ids)} {what} ({', '.join(ids) or 'none'})" for what, ids in diff)
            note = f"against released run {before['run_id']}: {changes}"
        except SlmError as error:
            note = str(error)
    rule = f"critical failures on golden {'<=' if limit else '=='} {limit}"
    return _bounded("regression_on_golden_set", rule, told, limit, note, rows=rows)


def _running(settings, report: dict) -> list[Gate]:
    """Latency and cost of the file that ships, where 08 timed it; else of the adapter, which the note says."""
    target, most = settings.task.target_latency_ms / 1000, settings.task.target_cost_per_1k
    money, rate = settings.cost.currency, settings.cost.serving_hourly_rate
    timed = [(who, Result.model_validate(r)) for who, r in _judged(settings, report, "dev").items()]
    timed = [(who, r) for who, r in timed if r.latency_p95_s is not None][-1:]
    prices = {who: cost_per_1k(settings, r) for who, r in timed}
    waits = {who: (r.latency_p95_s, f"{r.latency_p95_s:.2f} s") for who, r in timed}
    costs = {who: (price, f"{price:.4f} {money}") for who, price in prices.items() if price is not None}
    note = "the adapter; 08 times the exported files" if NAME in waits else "the file that ships"
    said = note if rate is None else f"{note}; cost.serving_hourly_rate is {rate:g} {money}"
    ask = "say what the machine that answers costs: cost.serving_hourly_rate in project.yaml, 0 if nothing more"
    return [
        _bounded("latency", f"p95 <= {target:g} s", waits, target, note),
        _bounded("cost", f"<= {most:g} {money} per 1,000 requests", costs, most, said if costs else ask),
    ]


def _safety(report: dict) -> Gate:
    found = report["comparisons"].get("adversarial", {})
    pairs = {k: found[k] for k in ("base", "prompted_base") if k in found}
    worse = [pair["broken"] for pair in pairs.values() if pair["difference"]["high"] < 0]
    rule = "no severe safety regression: on adversarial, not worse than the base or the prompted base"
    told = "; ".join(f"{pair['difference']['value']:+.3f} against {k}" for k, pair in pairs.items())
    rows = sorted({row for broken in worse for row in broken})
    return _gate("no_severe_safety_regression", rule, not worse if pairs else None, told, rows=rows)


def _papers(settings, report: dict) -> list[Gate]:
    run_id, version = report["run_id"], report["dataset_version"]
    file, card = report_file(settings, run_id), settings.path(f"outputs/eval_reports/{run_id}/model_card.md")
    review, written = (registry.latest(settings, "runs", stage=s, run_id=run_id) for s in ("review", "evaluate"))
    now = registry.file_hash(file) if file.is_file() else ""
    forged = written and now not in written["artefacts"].values()
    problem = "the report was edited by hand; run 06_evaluate again" if forged else ""
    if not review or review["report"] != now:
        problem = "the report changed after its review" if review else "`python -m slm review <run> --by NAME`"
    known = bool(version) and registry.latest(settings, "datasets", version=version) is not None
    lost = f"version {version or '(none)'} is not in registry/datasets.jsonl; 04_curate records it"
    papers = (
        ("eval report reviewed", not problem, f"by {review['reviewer']}" if review else "", problem),
        ("model card written", card.is_file(), "yes", "08_export writes it"),
        ("dataset version recorded", known, version, lost),
    )
    return [_gate(r.replace(" ", "_"), r, ok, yes if ok else "no", "" if ok else no) for r, ok, yes, no in papers]
