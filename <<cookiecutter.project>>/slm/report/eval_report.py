"""The report of 06 from its results: Markdown for people, JSON for the gates, PNGs beside them."""

import sys
from collections.abc import Sequence
from pathlib import Path

from slm import registry
from slm.contract import Contract
from slm.errors import SlmError
from slm.evaluate.candidate import by_set
from slm.evaluate.compare import FEW, Comparison, paired
from slm.evaluate.metrics import Result
from slm.evaluate.release import Gate, failed_rows, gates, report_file
from slm.report import plots, tables
from slm.report.baselines import baseline_report, columns, eval_plan, fields
from slm.rows import Row, write_json, write_text

__all__ = ["LINES", "baseline_report", "build", "columns", "differences", "eval_plan", "fields", "nine", "write"]
LINES = (
    "base_model_score", "prompted_base_score", "fine_tuned_model_score", "larger_model_score", "latency",
    "tokens_per_second", "cost_per_1k_requests", "schema_error_rate", "failure_examples",
)  # fmt: skip


def build(
    settings, contract: Contract, candidate: Sequence[Result], baselines: Sequence[Result], sets: dict[str, list[Row]]
) -> dict:
    """The whole evaluation as one record: verdict, the nine lines, results, comparisons, failures, gates. Raises
    SlmError when candidate and baselines were not run on the same rows, or no baseline ran."""
    name, found = contract.primary_metric, by_set([*baselines, *candidate])
    others = by_set(baselines)
    compared = {
        mine.set: {
            key: paired(mine.scores, other.scores, contract, settings)
            for key, other in others.get(mine.set, {}).items() if other.ran
        } for mine in candidate
    }  # fmt: skip
    headline = "test" if "test" in compared else "dev"
    if not compared.get(headline):
        raise SlmError(f"no baseline ran on {headline}; run 02_baseline first.")
    train = registry.latest(settings, "runs", stage="train", status="completed", run_id=settings.run_id)
    mine, timed, looks = found[headline]["fine_tuned"], found["dev"]["fine_tuned"], registry.read(settings, "looks")
    absent = Result(name="", set=headline, reason="not among the results")
    keys = ("base", "prompted_base", "fine_tuned", "larger")
    four = {line: found[headline].get(key, absent) for line, key in zip(LINES[:4], keys, strict=True)}
    failed = [
        {
            "set": r.set, "row_id": s.row_id, "kind": row.meta.kind, "critical": not s.critical_ok, "user": row.user,
            "expected": s.expected, "text": s.text, "explanation": s.explanation,
        } for r in candidate for s, row in zip(r.scores, sets[r.set], strict=True) if not s.exact
    ]  # fmt: skip
    report = {
        "run_id": settings.run_id, "profile": settings.profile, "settings": settings.hash, "headline_set": headline,
        "contract": {
            "name": contract.name, "task_type": contract.task_type, "primary_metric": name, "target": contract.target,
            "critical": list(contract.critical), "hash": contract.schema_hash,
        },
        "model": {"base": settings.model.base, "name": mine.model, "fingerprint": mine.fingerprint},
        "dataset_version": train and train["parents"]["dataset"], "versions": versions(),
        "sets": {
            r.set: {"hash": r.set_hash, "n": len(r.scores), "looks": sum(look["set"] == r.set for look in looks)}
            for r in candidate
        },
        "verdict": verdict(contract, mine, compared[headline]),
        "lines": {
            **{line: r.metrics[name].model_dump() if r.ran else {"not_run": r.reason} for line, r in four.items()},
            "latency": {"p50_s": timed.latency_p50_s, "p95_s": timed.latency_p95_s},
            "tokens_per_second": timed.tokens_per_second, "cost_per_1k_requests": timed.cost_per_1k_requests,
            "schema_error_rate": mine.metrics["schema_error_rate"].model_dump(),
            "failure_examples": [f for f in failed if f["set"] != "test"][:10],
        },
        "results": {
            set: {key: r.model_dump(exclude={"scores"}) for key, r in by_name.items()} for set, by_name in found.items()
            if set in compared
        },
        "comparisons": {set: {key: c.model_dump() for key, c in pairs.items()} for set, pairs in compared.items()},
        "failures": failed,
        "failed_rows": {r.set: {x.name: failed_rows(x.scores, contract) for x in candidate if x.set == r.set} for r in candidate},
    }  # fmt: skip
    report["gates"] = [gate.model_dump() for gate in gates(settings, report)]
    return report


def verdict(contract: Contract, mine: Result, pairs: dict[str, Comparison]) -> str:
    """One sentence: does the model beat the best baseline by more than noise, and does it reach the target?"""
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
    """Write eval_report.json, eval_report.md, the plots and the run's record; returns the path of the .md."""
    out, name = report_file(settings, settings.run_id).parent, contract.primary_metric
    found = by_set([*baselines, *candidate])
    shown = found[report["headline_set"]]
    mine = shown["fine_tuned"]
    pictures = [
        ("against the baselines", plots.models_bar(list(shown.values()), name, out / "models.png", contract.target)),
        ("by slice", plots.slices(mine, name, out / "slices.png")),
    ]
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
    left = sum(g.status != "pass" for g in own)
    state = f"{left} of {len(own)} release gates not passed" if left else "every release gate passed"
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
    return [
        {**({} if set else {"set": name}), **line}
        for name, pairs in report["comparisons"].items() if set in (None, name) for line in tables.comparisons(pairs)
    ]  # fmt: skip


def versions() -> dict[str, str]:
    """The versions of the packages that can move a score."""
    from importlib import metadata

    wanted = ("torch", "transformers", "peft", "trl", "llama-cpp-python")
    installed = {d.metadata["Name"].lower().replace("_", "-"): d.version for d in metadata.distributions()}
    return {"python": sys.version.split()[0], **{n: installed[n] for n in wanted if n in installed}}


def nine(report: dict, settings) -> list[dict]:
    """The nine lines that every report carries, as a table."""
    lines, cells = report["lines"], {}
    for key in LINES[:4]:
        cells[key] = f"not run: {lines[key]['not_run']}" if "not_run" in lines[key] else tables.metric(lines[key])
    wait, speed, cost = lines["latency"], lines["tokens_per_second"], lines["cost_per_1k_requests"]
    p50, p95 = tables.seconds(wait["p50_s"]), tables.seconds(wait["p95_s"])
    cells["latency"] = f"p50 {p50}, p95 {p95}, one request at a time"
    cells["tokens_per_second"] = f"{speed:.1f}" if speed else "-"
    cells["cost_per_1k_requests"] = f"{cost:.4f} {settings.cost.currency}" if cost else "no rates set in project.yaml"
    cells["schema_error_rate"] = tables.metric(lines["schema_error_rate"])
    cells["failure_examples"] = f"{len(lines['failure_examples'])} shown below"
    return [{"line": key, f"on {report['headline_set']}": value} for key, value in cells.items()]
