"""The fine-tuned model on the locked sets; every look at the test set is counted."""

from collections.abc import Sequence
from pathlib import Path

from slm import registry
from slm.contract import Contract
from slm.errors import SlmError
from slm.evaluate.baselines import check_sets, not_held, take
from slm.evaluate.metrics import Result, evaluate, read_results
from slm.rows import Row, read_rows, write_json

NAME = "fine_tuned"
CONSTRAINED = "fine_tuned_constrained"


def open_sets(settings, contract: Contract) -> dict[str, list[Row]]:
    """dev, golden and adversarial, checked against their lock; with `evaluate.final_test` test too, and counted."""
    registry.check_locked(settings)
    sets = check_sets(settings, contract)
    names = ["dev", "golden", "adversarial"]
    if settings.evaluate.final_test:
        looks = registry.count_look(settings, "test", settings.run_id, "final test of 06_evaluate")
        print(f"test.jsonl: look number {looks}" + (", no longer an unseen set" if looks > 1 else ""))
        names.append("test")
    return {name: take(settings, sets[name]) for name in names}


def run_candidate(settings, contract: Contract, model, sets: dict[str, list[Row]]) -> list[Result]:
    """The model on every set with the contract's own prompt, then held to the schema where that is measured; timed on
    dev, kept for 07 and 08 in `scores.json` of the run."""
    results = []
    for name, set in [(name, set) for name in (NAME, CONSTRAINED) for set in sets]:
        held, how = name == CONSTRAINED, {"set": set, "name": name, "latency": set == "dev"}
        try:
            if held and (reason := not_held(settings, set)):
                raise SlmError(reason)
            results.append(evaluate(settings, contract, model, sets[set], constrained=held, **how))
        except SlmError as error:  # a schema that the model cannot be held to is no reason to lose the rest
            if not held:
                raise
            results.append(Result(name=name, set=set, reason=str(error)))
    write_json(scores_file(settings, settings.run_id), [r.model_dump() for r in results])
    return results


def add_files(settings, results: Sequence[Result]) -> list[Result]:
    """Put the exported files' results into the run's `scores.json`, in place of an earlier export's; returns all."""
    own = [r for r in load_candidate(settings, settings.run_id) if r.name in (NAME, CONSTRAINED)]
    write_json(scores_file(settings, settings.run_id), [r.model_dump() for r in [*own, *results]])
    return [*own, *results]


def load_candidate(settings, run_id: str) -> list[Result]:
    """A run's results, scores included: the fine-tuned model's, and after 08 its files'. Raises SlmError when 06 was
    not run for it."""
    file = scores_file(settings, run_id)
    if not file.is_file():
        raise SlmError(f"{file}: run {run_id} has no scores yet; run 06_evaluate first.")
    return read_results(file, "06_evaluate")


def scored_sets(settings, results: Sequence[Result]) -> dict[str, list[Row]]:
    """The rows behind results, by set, as they were asked. No model is asked now: test among them is no new look."""
    registry.check_locked(settings)
    names = dict.fromkeys(r.set for r in results if r.ran)
    return {name: take(settings, read_rows(settings.path(f"data/eval/{name}.jsonl"))) for name in names}


def scores_file(settings, run_id: str) -> Path:
    """outputs/eval_reports/<run_id>/scores.json."""
    return settings.path(f"outputs/eval_reports/{run_id}/scores.json")


def by_set(results: Sequence[Result]) -> dict[str, dict[str, Result]]:
    """{set: {model name: Result}}."""
    table: dict[str, dict[str, Result]] = {}
    for result in results:
        table.setdefault(result.set, {})[result.name] = result
    return table


def open_model(settings, path: str):
    """The model at a path inside the project: a GGUF file, or a folder with an adapter or a whole model."""
    from slm import models
    from slm.models.llama_cpp import LlamaCppModel

    if not path:
        raise SlmError("--model: name an adapter folder or a .gguf file.")
    file = settings.path(path)
    if file.suffix == ".gguf":
        return LlamaCppModel(file, context=settings.evaluate.context, slots=settings.evaluate.slots)
    if not file.is_dir():
        raise SlmError(f"{path}: there is no such adapter folder or .gguf file; train first (05_train).")
    return models.student(settings, file)


def open_file(settings, path: str) -> list[Row]:
    """The rows of one evaluation file, limited as the settings say; a locked set is checked, a look at test counted.
    Raises SlmError for rows of test, in whatever file, before the final test."""
    file, test = settings.path(path), settings.path("data/eval/test.jsonl")
    rows = read_rows(file)
    if file.parent == test.parent and settings.path("data/eval/lock.json").exists():
        registry.check_locked(settings)
    if test.is_file() and {row.id for row in rows} & {row.id for row in read_rows(test)}:
        registry.count_look(settings, "test", settings.run_id, "a script")
    if not rows:
        raise SlmError(f"{path}: no rows.")
    return take(settings, rows)


def save_file(settings, result: Result, path: str, out: str) -> str:
    """Write one result with its scores to `out`; returns a line for the terminal."""
    write_json(settings.path(out), {**result.model_dump(), "set_hash": registry.file_hash(settings.path(path))})
    if not result.ran:
        return f"{result.name}: not run, {result.reason}. Wrote {out}"
    name, metric = next(iter(result.metrics.items()))
    wait = "" if result.latency_p50_s is None else f", p50 {result.latency_p50_s:.2f} s"
    return f"{result.name} on {path}: {name} {metric}, n={metric.n}{wait}. Wrote {out}"
