"""The reports of 02: the evaluation plan before any training, and what must be beaten."""

from collections.abc import Sequence
from pathlib import Path

from slm import registry
from slm.contract import Contract
from slm.evaluate.compare import FEW, detectable_difference, spread
from slm.evaluate.metrics import Result
from slm.evaluate.scorers import metric_names
from slm.evaluate.release import report_file
from slm.report import plots, tables
from slm.report.render import fill
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
    """Write specs/eval_plan.md: metric, target, intervals, what n can show, who may look at what. The registry keeps
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
    text = fill(
        "eval_plan.md", contract=contract, meaning=_MEANING.get(name, ""), others=metric_names(contract)[1:],
        critical_failures=settings.gates.critical_failures, confidence=f"{own.confidence:.0%}", resamples=own.resamples,
        few=FEW, sizes=sizes, spread=sd, source=source,
    )  # fmt: skip
    return write_text(settings.path("specs/eval_plan.md"), text)


def baseline_report(settings, contract: Contract, results: Sequence[Result]) -> Path:
    """Write baseline_report.md (root) with its plot in the run's folder."""
    name, ran = contract.primary_metric, [r for r in results if r.ran]
    best = max(ran, key=lambda r: r.metrics[name].value)
    cheap = max((r for r in ran if r.name in tables.CHEAP), key=lambda r: r.metrics[name].value, default=best)
    folder = report_file(settings, settings.run_id).parent
    plot = plots.models_bar(results, name, folder / "baselines.png", contract.target)
    reached = "already reaches" if best.metrics[name].value >= contract.target else "does not reach"
    text = fill(
        "baseline_report.md", contract=contract, settings=settings, name=name, best=best, cheap=cheap, reached=reached,
        confidence=f"{settings.evaluate.confidence:.0%}", models=tables.results(results, columns(contract)),
        fields=fields(ran), picture=plot.relative_to(settings.root).as_posix(),
    )  # fmt: skip
    return write_text(settings.path("baseline_report.md"), text)
