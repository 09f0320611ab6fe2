"""The evaluation as one record, and its files: JSON for the gates, Markdown and HTML for people, PNGs beside them."""

import platform
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from slm import registry
from slm.contract import Contract
from slm.errors import SlmError
from slm.evaluate.candidate import CONSTRAINED, NAME, by_set, load_candidate
from slm.evaluate.compare import FEW, Comparison, compare_results, detectable_difference, gap_closed, seeds
from slm.evaluate.metrics import Result
from slm.evaluate.preference import prefer
from slm.evaluate.release import failed_rows, gates, other_seeds, report_file
from slm.report import economy, html, plots, tables
from slm.report.baselines import baseline_report, columns, eval_plan, fields
from slm.report.render import LINES, differences, nine, render, table
from slm.rows import Row, write_json, write_text

PACKAGES = ("torch", "transformers", "peft", "trl", "llama-cpp-python")  # whose versions can move a score
__all__ = ["LINES", "baseline_report", "build", "columns", "differences", "eval_plan", "fields", "nine", "write"]


def build(
    settings, contract: Contract, candidate: Sequence[Result], baselines: Sequence[Result], sets: dict[str, list[Row]]
) -> dict:
    """The whole evaluation as one record: verdict, the nine lines, results, comparisons, failures, gates. `candidate`
    may hold the constrained variant and the exported files beside the fine-tuned model. Raises SlmError when they were
    not run on the same rows, or no baseline ran."""
    name, found = contract.primary_metric, by_set([*baselines, *candidate])
    compared = {set: against(found[set], NAME, contract, settings) for set in found if NAME in found[set]}
    headline = "test" if "test" in compared else "dev"
    if not any(key in tables.BASELINES for key in compared.get(headline, ())):
        raise SlmError(f"no baseline ran on {headline}; run 02_baseline first.")
    train = registry.latest(settings, "runs", stage="train", status="completed", run_id=settings.run_id)
    shown, looks = found[headline], Counter(look["set"] for look in registry.read(settings, "looks"))
    mine, timed = shown[NAME], found["dev"][NAME]
    absent = Result(name="", set=headline, reason="not among the results")
    keys = ("base", "prompted_base", NAME, "larger")
    four = {line: shown.get(key, absent) for line, key in zip(LINES[:4], keys, strict=True)}
    best = strongest(compared[headline], tables.BASELINES)
    pair = compared[headline][best]
    warned = [f"{tables.title(r.name)} on {r.set}: {w}" for r in candidate for w in r.warnings]
    if contract.task_type == "rewriting" and settings.evaluate.judge.url:
        pair.preference = prefer(settings, contract, sets[headline], mine.scores, shown[best].scores)
        warned += pair.preference.warnings
    failed = [f for r in candidate if r.name == NAME for f in failures(r, sets[r.set], contract)]
    report = {
        "run_id": settings.run_id, "profile": settings.profile, "settings": settings.hash, "headline_set": headline,
        "contract": {
            "name": contract.name, "task_type": contract.task_type, "primary_metric": name, "target": contract.target,
            "hash": contract.schema_hash, "schema": contract.schema, "system_prompt": contract.system_prompt,
            "label_field": contract.label_field, "null_label": contract.null_label, "critical": list(contract.critical),
            "unsafe_labels": list(contract.unsafe_labels), "issue_key": list(contract.issue_key),
        },
        "model": {"base": settings.model.base, "name": mine.model, "fingerprint": mine.fingerprint},
        "dataset_version": train and train["parents"]["dataset"], "versions": {"python": platform.python_version(), **registry.versions(PACKAGES)},
        "sets": {
            set: {"hash": found[set][NAME].set_hash, "n": len(found[set][NAME].scores), "looks": looks[set]}
            for set in compared
        },
        "looks_at_test": looks["test"], "verdict": verdict(contract, mine, compared[headline]),
        "warnings": warned, "strongest": best, "strongest_cheap": strongest(compared[headline], tables.CHEAP),
        "detectable": detectable(settings, contract, {set: len(found[set][NAME].scores) for set in compared}, train),
        "gap_closed": gap(shown, contract, settings), "seeds": seeds_line(settings, mine),
        "preference": (train or {}).get("preference", {}).get("verdict", ""),
        "general_loss": {at: (train or {}).get("metrics", {}).get(f"general_loss_{at}") for at in ("first", "final")},
        "lines": {
            **{line: r.metrics[name].model_dump() if r.ran else {"not_run": r.reason} for line, r in four.items()},
            "latency": {"p50_s": timed.latency_p50_s, "p95_s": timed.latency_p95_s, "p99_s": timed.latency_p99_s},
            "tokens_per_second": timed.tokens_per_second, "cost_per_1k_requests": timed.cost_per_1k_requests,
            "schema_error_rate": mine.metrics["schema_error_rate"].model_dump(),
            "failure_examples": [f for f in failed if f["set"] != "test"][:10],
        },
        "results": {
            set: {key: r.model_dump(exclude={"scores"}) for key, r in found[set].items()} for set in compared
        },
        "comparisons": {set: {key: c.model_dump() for key, c in pairs.items()} for set, pairs in compared.items()},
        "constrained": {
            set: {
                key: c.model_dump() for key, c in against(found[set], CONSTRAINED, contract, settings).items()
                if key == NAME or found[set][key].constrained
            } for set in compared if CONSTRAINED in found[set]
        },
        "not_run": not_run(settings, contract, found, compared), "failures": failed,
        "failed_rows": {
            set: {r.name: failed_rows(r.scores, contract) for r in candidate if r.set == set} for set in compared
        },
    }  # fmt: skip
    report["cost"] = economy.economy(settings, found["dev"], compared["dev"])
    report["gates"] = [gate.model_dump() for gate in gates(settings, report)]
    return report


def against(found: dict[str, Result], mine: str, contract: Contract, settings) -> dict[str, Comparison]:
    """Model `mine` paired with every other model that ran on the same set."""
    return {
        key: compare_results(found[mine], other, contract, settings)
        for key, other in found.items() if key != mine and other.ran and found[mine].ran
    }  # fmt: skip


def strongest(pairs: dict[str, Comparison], among: Sequence[str]) -> str | None:
    """The name of the best of some models that ran."""
    return max((key for key in among if key in pairs), default=None, key=lambda key: pairs[key].baseline)


def failures(result: Result, rows: Sequence[Row], contract: Contract) -> list[dict]:
    """The rows that a model got wrong, the worst first: critical ones, then by score. Of test rows only the ids."""
    graded = contract.task_type in ("rewriting", "qa", "review", "planning")  # more than one right answer
    wrong = [
        (s, row) for s, row in zip(result.scores, rows, strict=True)
        if not s.critical_ok or (s.value < 1 if graded else not s.exact)
    ]  # fmt: skip
    return [
        {"set": result.set, "row_id": s.row_id, "kind": row.meta.kind, "critical": not s.critical_ok} | (
            {} if result.set == "test" else {
                "user": row.user, "expected": s.expected, "given": s.parsed or s.lenient_parsed, "text": s.text,
                "value": s.value, "stage": s.stage, "explanation": s.explanation,
                "wrong": [n for n, ok in s.fields.items() if not ok],
            }
        ) for s, row in sorted(wrong, key=lambda w: (w[0].critical_ok, w[0].value, sum(w[0].fields.values())))
    ]  # fmt: skip


def detectable(settings, contract: Contract, sizes: dict[str, int], train: dict | None) -> dict:
    """The smallest difference that each set can show, with the spread that 02 stated, and when it stated it."""
    plan = registry.latest(settings, "runs", stage="plan", contract=contract.schema_hash)
    spread, at = (plan["spread"], plan["at"]) if plan else (0.4, "")
    when = "before training" if plan and (not train or at <= train["at"]) else "after training" if plan else "only now"
    differences = {set: detectable_difference(n, spread, settings.evaluate.confidence) for set, n in sizes.items()}
    return {"spread": spread, "stated": when, "at": at, "difference": differences}


def gap(shown: dict[str, Result], contract: Contract, settings) -> dict:
    """The share of the way from the base to the larger model that the fine-tune has gone, or why it is unknown."""
    missing = [f"{tables.title(k)} not run" for k in ("base", "larger") if k not in shown or not shown[k].ran]
    found = None if missing else gap_closed(shown[NAME], shown["base"], shown["larger"], contract, settings)
    why = "; ".join(missing) or "the larger model is not shown to be better than the base"
    return found.model_dump() if found else {"not_run": why}


def seeds_line(settings, mine: Result) -> dict:
    """The primary metric over the runs that differ in the seed alone; one run is no mean."""
    runs = other_seeds(settings, settings.run_id)
    same = [r for run in runs for r in load_candidate(settings, run) if (r.name, r.set) == (NAME, mine.set)]
    if not same:
        return {"not_run": "no other run of this recipe, dataset version and base with another train.seed"}
    return {**seeds([mine, *same], settings.evaluate.confidence).model_dump(), "runs": [settings.run_id, *runs]}


def not_run(settings, contract: Contract, found: dict[str, dict[str, Result]], compared: dict) -> list[dict]:
    """What this report does not hold, and why: nothing is left out silently."""
    shown, own, mine = found["dev"], settings.evaluate, found["dev"][NAME]
    reasons = {f"{tables.title(r.name)} on {r.set}": r.reason for s in compared for r in found[s].values() if not r.ran}
    absent = {
        "base with retrieval": "rag" not in shown and (
            "02_baseline left it out" if settings.task.needs_knowledge else "the task needs no documents"),
        "classical model": "classical" not in shown and "no labelled field, or 02_baseline left it out",
        "constrained decoding": CONSTRAINED not in shown and (
            "06_evaluate left it out" if own.constrained else "evaluate.constrained is off"),
        "exported files": not any(key in shown for key in tables.FILES) and "08_export has not scored any of them",
        "test set": "test" not in compared and "not opened; evaluate.final_test opens it, once",
        "calibration": not mine.calibration and (
            "the answers carry no token probabilities" if contract.label_field else "the contract has no label"),
        "rubric and preference": contract.task_type == "rewriting" and not own.judge.url and "no evaluate.judge is set",
        "cost": mine.cost_per_1k_requests is None and "no rates in the section `cost` of project.yaml",
        "memory": mine.memory_mb is None and "not measured for this model",
        "time to first token": mine.first_token_s is None and "not measured for this model",
    }  # fmt: skip
    reasons |= {what: why for what, why in absent.items() if why}
    by_reason: dict[str, list[str]] = {}
    for what, why in reasons.items():
        by_reason.setdefault(why, []).append(what)
    return [{"not run": "; ".join(what), "why": why} for why, what in by_reason.items()]


def verdict(contract: Contract, mine: Result, pairs: dict[str, Comparison]) -> str:
    """One sentence: does the model beat the best baseline by more than noise, and does it reach the target?"""
    pairs = {key: pair for key, pair in pairs.items() if key in tables.BASELINES}
    best = strongest(pairs, tables.BASELINES)
    gain, score = pairs[best].difference, mine.metrics[contract.primary_metric]
    reached = "reached" if score.value >= contract.target else "not reached"
    tail = f"{contract.primary_metric} {score} on {mine.set}, {gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]; "
    tail += f"target {contract.target:g} {reached}."
    who = f"the best baseline ({tables.title(best)})"
    left = [key for key, pair in pairs.items() if pair.outcome != "better"]
    if not left:
        return f"Better than every baseline; against {who}: {tail}"
    if gain.n < FEW:
        return f"Too few rows for a verdict ({gain.n}, at least {FEW}); against {who}: {tail}"
    if best in left:
        start = "Worse than" if pairs[best].outcome == "worse" else "No difference shown against"
        return f"{start} {who}: {tail}"
    return f"Better than {who}, but not shown against: {', '.join(map(tables.title, left))}. {tail}"


def write(settings, contract: Contract, report: dict, candidate: Sequence[Result], baselines: Sequence[Result]) -> Path:
    """Write eval_report.json, .md and .html, the plots and the run's record; returns the path of the .md."""
    out, name = report_file(settings, settings.run_id).parent, contract.primary_metric
    found = by_set([*baselines, *candidate])
    shown = table(found, report["headline_set"])
    mine = found[report["headline_set"]][NAME]
    pictures = {
        "all models": plots.models_bar(shown, name, out / "models.png", contract.target),
        "by slice": plots.slices(mine, name, out / "slices.png"),
    }
    if report["cost"]["own"]["per request"] is not None and report["cost"]["other"]["tokens per request"]:
        pictures["does it pay"] = plots.break_even(report["cost"], out / "break_even.png")
    if mine.confusion:
        pictures["confusion matrix"] = plots.confusion(mine, out / "confusion.png")
    if mine.calibration:
        pictures["reliability"] = plots.reliability(mine, out / "reliability.png")
    text = render(settings, contract, report, found, pictures)
    files = [
        write_json(report_file(settings, settings.run_id), report), write_text(out / "eval_report.md", text),
        write_text(out / "eval_report.html", html.page(text, out)),
    ]  # fmt: skip
    registry.append(settings, "runs", {
        "stage": "evaluate", "run_id": settings.run_id, "profile": settings.profile, "settings": settings.hash,
        "dataset_version": report["dataset_version"], "model": report["model"], "contract": contract.schema_hash,
        "sets": {n: s["hash"] for n, s in report["sets"].items()}, "verdict": report["verdict"],
        "metrics": {k: m.model_dump() for k, m in mine.metrics.items()}, "versions": report["versions"],
        "artefacts": {str(p.relative_to(settings.root)): registry.file_hash(p) for p in files},
    })  # fmt: skip
    return files[1]
