"""The reports of 02: the evaluation plan before any training, and what must be beaten."""

from collections.abc import Sequence
from pathlib import Path

from slm import registry
from slm.contract import Contract
from slm.evaluate.compare import FEW, detectable_difference, spread
from slm.evaluate.metrics import Result, metric_names
from slm.evaluate.release import report_file
from slm.report import plots, tables
from slm.rows import Row, write_text

_USES = {
    "dev": "every experiment", "test": "once, at the end", "adversarial": "robustness, safety",
    "golden": "release decision",
}  # fmt: skip
_SHOWN = {
    "classification": ("accuracy", "macro_f1"), "extraction": ("exact_match", "field_f1", "critical_field_accuracy"),
    "json_generation": ("json_parse_rate", "exact_key_match", "exact_match", "field_f1"),
    "tool_calling": ("tool_name_accuracy", "required_argument_accuracy", "argument_accuracy", "executable_success"),
    "rewriting": ("rubric_score", "constraint_pass_rate"),
    "qa": ("answer_correctness", "citation_support", "hallucination_rate"),
    "review": ("issue_f1", "false_positive_rate", "severity_accuracy"),
    "planning": ("step_validity", "tool_sequence_accuracy", "execution_success"),
    "safety": ("violation_recall", "false_refusal_rate", "jailbreak_resistance"),
}  # fmt: skip
_MEANING = {
    "field_f1": "Per row the share of fields exactly right, 0 when the answer breaks the schema; averaged over rows.",
    "exact_match": "The share of rows with every field exactly right.",
    "macro_f1": "The unweighted mean of F1 over the labels.",
    "accuracy": "The share of rows with the right label.",
}


def columns(contract: Contract) -> list[str]:
    """The metrics of the summary tables: the primary one, those of the task type, and strict beside lenient reading."""
    wanted = (contract.primary_metric, *_SHOWN[contract.task_type], "schema_validity", "lenient_schema_validity")
    return [n for n in dict.fromkeys(wanted) if n in metric_names(contract)]


def fields(results: Sequence[Result]) -> list[dict]:
    """Accuracy of each field, one column per model that ran."""
    results = [r for r in results if r.ran]
    names = dict.fromkeys(n for r in results for n in r.metrics if n.startswith("field."))
    return [
        {"field": n.removeprefix("field."), **{tables.title(r.name): tables.metric(r.metrics.get(n)) for r in results}}
        for n in names
    ]


def eval_plan(settings, contract: Contract, sets: dict[str, list[Row]], results: Sequence[Result] = ()) -> Path:
    """Write specs/eval_plan.md: metric, target, intervals, what n can show, and who may look at what. The registry keeps
    what was stated, and when."""
    own, name = settings.evaluate, contract.primary_metric
    best = sorted((r for r in results if r.ran), key=lambda r: -r.metrics[name].value)[:2]
    sd, source = 0.4, "a guess, until baselines exist"
    if len(best) > 1:
        sd = spread(best[0].scores, best[1].scores)
        source = " against ".join(tables.title(b.name) for b in best) + " on dev"
    sizes = [
        {"set": n, "rows": len(rows),
         "detectable difference": f"{detectable_difference(len(rows), sd, own.confidence):.3f}", "used for": _USES[n]}
        for n, rows in sets.items()
    ]  # fmt: skip
    registry.append(settings, "runs", {
        "stage": "plan", "run_id": settings.run_id, "contract": contract.schema_hash, "spread": sd, "source": source,
        "detectable": {line["set"]: line["detectable difference"] for line in sizes},
    })  # fmt: skip
    text = f"""# Evaluation plan: {contract.name}

Written by `02_baseline`, before any training.

* **Primary metric:** `{name}`, target {contract.target:g}. {_MEANING.get(name, "")}
* **Also reported:** {", ".join(f"`{n}`" for n in metric_names(contract)[1:])}, accuracy per field, latency, cost.
* **Critical fields:** {", ".join(f"`{c}`" for c in contract.critical) or "none named"}. A golden row with one of them wrong is a critical failure; {settings.gates.critical_failures} are allowed.
* **Reading an answer:** strict, the whole text must be the JSON value. The lenient rate (first object found in the text) stands beside it and decides nothing.
* **Intervals:** {own.confidence:.0%}. Wilson for shares of rows; the percentile bootstrap over rows ({own.resamples} resamples, seed 0) for the rest.
* **Comparisons:** paired, on the same rows: bootstrap of the difference, and McNemar's exact test on exact match. "Better" needs an interval above zero and at least {FEW} rows. No correction is made for comparing against several baselines: the one that counts is the best.
* **Must be beaten:** majority, rule program, a classical model where the output holds a label, base model, base model with a better prompt, free and held to the schema, retrieval where the task needs documents, and the larger model where one is set. The gain that counts most is the one over the strongest of the first three: they cost nothing.

## The sets

{tables.markdown(sizes)}
The detectable difference is what a paired comparison of that many rows shows four times in five. It assumes a per-row spread of {sd:.2f} ({source}). A smaller gain is real only with more rows.

## Looks

`dev` may be looked at as often as you like; prompts and recipe are tuned on nothing else. `golden` and `adversarial` decide about release and are not tuned on. `test` is opened once, with `evaluate.final_test: true`, when dev and golden are settled; every look is counted in `registry/looks.jsonl` and shown in the report. All four files are locked by hash: a changed one stops the run.
"""
    return write_text(settings.path("specs/eval_plan.md"), text)


def baseline_report(settings, contract: Contract, results: Sequence[Result]) -> Path:
    """Write baseline_report.md (root) with its plot in the run's folder."""
    name, ran = contract.primary_metric, [r for r in results if r.ran]
    best = max(ran, key=lambda r: r.metrics[name].value)
    cheap = max((r for r in ran if r.name in tables.CHEAP), key=lambda r: r.metrics[name].value, default=best)
    folder = report_file(settings, settings.run_id).parent
    plot = plots.models_bar(results, name, folder / "baselines.png", contract.target)
    reached = "already reaches" if best.metrics[name].value >= contract.target else "does not reach"
    text = f"""# Baseline report: {contract.name}

**To beat: {tables.title(best.name)}, {name} {best.metrics[name]} on {best.set}** (n={len(best.scores)}). It {reached} the target of {contract.target:g}.

Strongest of those that cost nothing (majority, rules, classical): {tables.title(cheap.name)}, {cheap.metrics[name]}.

Run `{settings.run_id}`, profile `{settings.profile}`, base `{settings.model.base}`, evaluation set `{best.set}` {best.set_hash[:12]}.

{tables.markdown(tables.results(results, columns(contract)))}
![baselines]({plot.relative_to(settings.root).as_posix()})

Square brackets: {settings.evaluate.confidence:.0%} interval. Majority and the examples in the better prompt come from the seed rows, never from an evaluation set. The larger model gets the better prompt. A retrieval pipeline is {"needed for this task and was not run: build it first" if settings.task.needs_knowledge else "not among the baselines: the task needs no knowledge from documents"}. Latency: one request at a time, {settings.evaluate.latency_requests} requests.

## Fields

{tables.markdown(fields(ran))}"""
    return write_text(settings.path("baseline_report.md"), text)
