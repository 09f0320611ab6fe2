"""The reports of 02 and 06 from their results: Markdown for people, JSON for the gates, PNGs beside them."""

import sys
from collections.abc import Sequence
from pathlib import Path

from slm import registry
from slm.contract import Contract
from slm.errors import SlmError
from slm.evaluate.candidate import by_set
from slm.evaluate.compare import FEW, Comparison, detectable_difference, paired, spread
from slm.evaluate.metrics import Result, metric_names
from slm.evaluate.release import Gate, gates, report_file
from slm.report import plots, tables
from slm.rows import Row, write_json, write_text

LINES = (
    "base_model_score", "prompted_base_score", "fine_tuned_model_score", "larger_model_score", "latency",
    "tokens_per_second", "cost_per_1k_requests", "schema_error_rate", "failure_examples",
)  # fmt: skip


def folder(settings) -> Path:
    """outputs/eval_reports/<run_id>."""
    return settings.path(f"outputs/eval_reports/{settings.run_id}")


def columns(contract: Contract) -> list[str]:
    """The metrics of the summary tables."""
    wanted = {"exact_match", "schema_validity", "lenient_schema_validity", contract.primary_metric}
    wanted |= {"macro_f1", "critical_field_accuracy", "tool_name_accuracy", "argument_f1"}
    return [n for n in metric_names(contract) if n in wanted]


# 02: what must be beaten


def eval_plan(settings, contract: Contract, sets: dict[str, list[Row]], results: Sequence[Result] = ()) -> Path:
    """Write specs/eval_plan.md: metric, target, intervals, what n can show, and who may look at what."""
    own, ran = settings.evaluate, [r for r in results if r.ran]
    ranked = sorted(ran, key=lambda r: -r.metrics[contract.primary_metric].value)
    sd = spread(ranked[0].scores, ranked[1].scores) if len(ranked) > 1 else 0.4
    source = (
        f"{ranked[0].name} against {ranked[1].name} on dev" if len(ranked) > 1 else "a guess, until baselines exist"
    )
    sizes = [
        {"set": n, "rows": len(rows), "detectable difference": f"{detectable_difference(len(rows), sd, own.confidence):.3f}",
         "used for": _USES[n]} for n, rows in sets.items()
    ]  # fmt: skip
    text = f"""# Evaluation plan: {contract.name}

Written by `02_baseline`, before any training.

* **Primary metric:** `{contract.primary_metric}`, target {contract.target:g}. {_MEANING.get(contract.primary_metric, "")}
* **Also reported:** {", ".join(f"`{n}`" for n in metric_names(contract)[1:])}, accuracy per field, latency, cost.
* **Critical fields:** {", ".join(f"`{c}`" for c in contract.critical) or "none named"}. A golden row with one of them wrong is a critical failure; {own.critical_failures_allowed} are allowed.
* **Reading an answer:** strict, the whole text must be the JSON value. The lenient rate (first object found in the text) stands beside it and decides nothing.
* **Intervals:** {own.confidence:.0%}. Wilson for shares of rows; the percentile bootstrap over rows ({own.resamples} resamples, seed 0) for the rest.
* **Comparisons:** paired, on the same rows: bootstrap of the difference, and McNemar's exact test on exact match. "Better" needs an interval above zero and at least {FEW} rows. No correction is made for comparing against several baselines: the one that counts is the best.
* **Must be beaten:** majority, rule program, base model, base model with a better prompt, and the larger model where one is set.

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
    plot = plots.models_bar(results, name, folder(settings) / "baselines.png", contract.target)
    reached = "already reaches" if best.metrics[name].value >= contract.target else "does not reach"
    text = f"""# Baseline report: {contract.name}

**To beat: {tables.TITLES[best.name]}, {name} {best.metrics[name]} on {best.set}** (n={len(best.scores)}). It {reached} the target of {contract.target:g}.

Run `{settings.run_id}`, profile `{settings.profile}`, base `{settings.model.base}`, evaluation set `{best.set}` {best.set_hash[:12]}.

{tables.markdown(tables.results(results, columns(contract)))}
![baselines]({plot.relative_to(settings.root).as_posix()})

Square brackets: {settings.evaluate.confidence:.0%} interval. Majority and the examples in the better prompt come from the seed rows, never from an evaluation set. The larger model gets the better prompt. A retrieval pipeline is {"needed for this task and was not run: build it first" if settings.task.needs_knowledge else "not among the baselines: the task needs no knowledge from documents"}. Latency: one request at a time, {settings.evaluate.latency_requests} requests.

## Fields

{tables.markdown(fields(ran))}"""
    return write_text(settings.path("baseline_report.md"), text)


# 06: the fine-tuned model


def compare_all(candidate: Sequence[Result], baselines: Sequence[Result], contract: Contract, settings):
    """{set: {baseline: Comparison}} of every baseline that ran. Raises SlmError when rows differ."""
    others = by_set(baselines)
    return {
        mine.set: {
            name: paired(mine.scores, other.scores, contract, settings)
            for name, other in others.get(mine.set, {}).items() if other.ran
        } for mine in candidate
    }  # fmt: skip


def build(
    settings, contract: Contract, candidate: Sequence[Result], baselines: Sequence[Result], sets: dict[str, list[Row]]
) -> dict:
    """The whole evaluation as one record: verdict, the nine lines, results, comparisons, failures, gates.

    Raises SlmError when candidate and baselines were not run on the same rows, or no baseline ran.
    """
    name, found = contract.primary_metric, by_set([*baselines, *candidate])
    compared = compare_all(candidate, baselines, contract, settings)
    headline = "test" if "test" in compared else "dev"
    if not compared.get(headline):
        raise SlmError(f"no baseline ran on {headline}; run 02_baseline first.")
    mine = found[headline]["fine_tuned"]
    timed = found["dev"]["fine_tuned"]
    failed = [
        _failure(r, s, row) for r in candidate for s, row in zip(r.scores, sets[r.set], strict=True) if not s.exact
    ]
    report = {
        "run_id": settings.run_id, "profile": settings.profile, "settings": settings.hash, "headline_set": headline,
        "contract": {
            "name": contract.name, "task_type": contract.task_type, "primary_metric": name, "target": contract.target,
            "critical": list(contract.critical), "hash": contract.schema_hash,
        },
        "model": {"base": settings.model.base, "name": mine.model, "fingerprint": mine.fingerprint},
        "dataset_version": dataset_version(settings), "versions": versions(),
        "sets": {
            r.set: {"hash": r.set_hash, "n": len(r.scores), "looks": _looks(settings, r.set)} for r in candidate
        },
        "verdict": verdict(contract, mine, compared[headline]),
        "lines": {
            **{
                line: _line(found[headline].get(key), name)
                for line, key in zip(LINES[:4], ("base", "prompted_base", "fine_tuned", "larger"), strict=True)
            },
            "latency": {"p50_s": timed.latency_p50_s, "p95_s": timed.latency_p95_s},
            "tokens_per_second": timed.tokens_per_second, "cost_per_1k_requests": timed.cost_per_1k_requests,
            "schema_error_rate": mine.metrics["schema_error_rate"].model_dump(),
            "failure_examples": [f for f in failed if f["set"] != "test"][:10],
        },
        "results": {
            set: {key: r.model_dump(exclude={"scores"}) for key, r in by_name.items()} for set, by_name in found.items()
            if set in compared
        },
        "comparisons": {
            set: {key: {**c.model_dump(), "verdict": c.verdict} for key, c in pairs.items()} for set, pairs in compared.items()
        },
        "failures": failed,
    }  # fmt: skip
    report["gates"] = [gate.model_dump() for gate in gates(settings, report)]
    return report


def verdict(contract: Contract, mine: Result, pairs: dict[str, Comparison]) -> str:
    """One sentence: does the fine-tuned model beat the best baseline by more than noise, and does it reach the target?"""
    best = max(pairs, key=lambda key: pairs[key].baseline)
    gain, score = pairs[best].difference, mine.metrics[contract.primary_metric]
    reached = "reached" if score.value >= contract.target else "not reached"
    tail = f"{contract.primary_metric} {score} on {mine.set}, {gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]; "
    tail += f"target {contract.target:g} {reached}."
    who = f"the best baseline ({tables.TITLES[best]})"
    if all(pair.verdict == "better" for pair in pairs.values()):
        return f"Better than every baseline; against {who}: {tail}"
    if gain.n < FEW:
        return f"Too few rows for a verdict ({gain.n}, at least {FEW}); against {who}: {tail}"
    if pairs[best].verdict == "no difference shown":
        return f"No difference shown against {who}: {tail}"
    if pairs[best].verdict == "worse":
        return f"Worse than {who}: {tail}"
    open_ = ", ".join(tables.TITLES[k] for k, pair in pairs.items() if pair.verdict != "better")
    return f"Better than {who}, but not shown against: {open_}. {tail}"


def write(settings, contract: Contract, report: dict, candidate: Sequence[Result], baselines: Sequence[Result]) -> Path:
    """Write eval_report.json, eval_report.md and the plots into the run's folder, and the run's record; the .md's path."""
    out, name, found = folder(settings), contract.primary_metric, by_set([*baselines, *candidate])
    pictures = [
        (
            "against the baselines",
            plots.models_bar(list(found[report["headline_set"]].values()), name, out / "models.png", contract.target),
        )
    ]
    mine = found[report["headline_set"]]["fine_tuned"]
    pictures.append(("by slice", plots.slices(mine, name, out / "slices.png")))
    if mine.confusion:
        pictures.append(("confusion matrix", plots.confusion(mine, out / "confusion.png")))
    file = write_json(report_file(settings, settings.run_id), report)
    text = write_text(out / "eval_report.md", render(settings, contract, report, found, pictures))
    registry.append(settings, "runs", {
        "stage": "evaluate", "run_id": settings.run_id, "profile": settings.profile, "settings": settings.hash,
        "dataset_version": report["dataset_version"], "model": report["model"], "contract": contract.schema_hash,
        "sets": {n: s["hash"] for n, s in report["sets"].items()}, "verdict": report["verdict"],
        "metrics": {k: m.model_dump() for k, m in mine.metrics.items()}, "versions": report["versions"],
        "artefacts": {str(p.relative_to(settings.root)): registry.file_hash(p) for p in (file, text)},
    })  # fmt: skip
    return text


def render(settings, contract: Contract, report: dict, found: dict, pictures: list[tuple[str, Path]]) -> str:
    """The Markdown of an evaluation report, verdict first."""
    own = [Gate.model_validate(g) for g in report["gates"]]
    open_gates = [g for g in own if g.status != "pass"]
    state = (
        "every release gate passed" if not open_gates else f"{len(open_gates)} of {len(own)} release gates not passed"
    )
    parts = [
        f"# Evaluation report: {contract.name}, run {report['run_id']}\n",
        f"**{report['verdict']}**\n\n**Release:** {state}.\n",
        f"Profile `{report['profile']}`, base `{report['model']['base']}`, dataset version "
        f"`{report['dataset_version'] or 'not recorded'}`, settings `{report['settings']}`. "
        f"Square brackets: {settings.evaluate.confidence:.0%} interval.\n",
        "## Always reported\n", tables.markdown(nine(report, settings)),
    ]  # fmt: skip
    for set, by_name in found.items():
        if set not in report["comparisons"]:
            continue
        looks = f" (look number {report['sets'][set]['looks']})" if set == "test" else ""
        parts += [
            f"\n## On {set}{looks}\n", tables.markdown(tables.results(list(by_name.values()), columns(contract))),
            "\nFine-tuned minus baseline, same rows:\n", tables.markdown(differences(report, set)),
        ]  # fmt: skip
    parts += ["\n## Fields\n", tables.markdown(fields(list(found[report["headline_set"]].values())))]
    parts += [f"\n## Plot: {title}\n\n![{title}]({path.name})" for title, path in pictures]
    parts += ["\n## Release gates\n", tables.markdown(tables.gates(own))]
    shown = [f for f in report["failures"] if f["set"] != "test"]
    parts += [f"\n## Failures\n\n{len(report['failures'])} rows not exactly right; the first 25, without test rows:\n",
              tables.markdown(tables.failures(shown, 25))]  # fmt: skip
    return "\n".join(parts) + "\n"


def differences(report: dict, set: str | None = None) -> list[dict]:
    """Fine-tuned minus each baseline, on one set or on all."""
    lines = []
    for name, pairs in report["comparisons"].items():
        if set in (None, name):
            found = {
                k: Comparison.model_validate({n: v for n, v in c.items() if n != "verdict"}) for k, c in pairs.items()
            }
            lines += [{**({} if set else {"set": name}), **line} for line in tables.comparisons(found)]
    return lines


def dataset_version(settings) -> str | None:
    """The recorded dataset version that this run's model was trained on; None when its training names none."""
    record = registry.latest(settings, "runs", stage="train", status="completed", run_id=settings.run_id)
    return record and record["parents"]["dataset"]


def versions() -> dict[str, str]:
    """The versions of the packages that can move a score."""
    from importlib import metadata

    wanted = ("torch", "transformers", "peft", "trl", "llama-cpp-python")
    installed = {d.metadata["Name"].lower().replace("_", "-"): d.version for d in metadata.distributions()}
    return {"python": sys.version.split()[0], **{n: installed[n] for n in wanted if n in installed}}


def _failure(result: Result, score, row: Row) -> dict:
    return {
        "set": result.set, "row_id": score.row_id, "kind": row.meta.kind, "critical": not score.critical_ok,
        "user": row.user, "expected": score.expected, "text": score.text, "explanation": score.explanation,
    }  # fmt: skip


def _line(result: Result | None, name: str) -> dict:
    if result is None or not result.ran:
        return {"not_run": result.reason if result else "not among the results"}
    return result.metrics[name].model_dump()


def nine(report: dict, settings) -> list[dict]:
    """The nine lines that every report carries, as a table."""
    lines, cells = report["lines"], {}
    for key in LINES[:4]:
        cells[key] = f"not run: {lines[key]['not_run']}" if "not_run" in lines[key] else tables.metric(lines[key])
    wait, speed, cost = lines["latency"], lines["tokens_per_second"], lines["cost_per_1k_requests"]
    cells["latency"] = (
        f"p50 {tables.seconds(wait['p50_s'])}, p95 {tables.seconds(wait['p95_s'])}, one request at a time"
    )
    cells["tokens_per_second"] = f"{speed:.1f}" if speed else "-"
    cells["cost_per_1k_requests"] = f"{cost:.4f} {settings.cost.currency}" if cost else "no rates set in project.yaml"
    cells["schema_error_rate"] = tables.metric(lines["schema_error_rate"])
    cells["failure_examples"] = f"{len(lines['failure_examples'])} shown below"
    return [{"line": key, f"on {report['headline_set']}": value} for key, value in cells.items()]


def fields(results: Sequence[Result]) -> list[dict]:
    """Accuracy of each field, one column per model that ran."""
    results = [r for r in results if r.ran]
    names = dict.fromkeys(n for r in results for n in r.metrics if n.startswith("field."))
    return [
        {"field": n.removeprefix("field."), **{tables.TITLES[r.name]: tables.metric(r.metrics.get(n)) for r in results}}
        for n in names
    ]


def _looks(settings, name: str) -> int:
    return sum(record["set"] == name for record in registry.read(settings, "looks"))


_USES = {
    "dev": "every experiment", "test": "once, at the end", "adversarial": "robustness, safety", "golden": "release decision",
}  # fmt: skip
_MEANING = {
    "field_f1": "Per row the share of fields exactly right, 0 when the answer breaks the schema; averaged over rows.",
    "exact_match": "The share of rows with every field exactly right.",
    "macro_f1": "The unweighted mean of F1 over the labels.",
    "accuracy": "The share of rows with the right label.",
}
