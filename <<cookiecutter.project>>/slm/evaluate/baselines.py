"""What must be beaten: the evaluation sets checked and locked, and five baselines on the same rows."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from slm import registry
from slm.contract import Contract
from slm.errors import SlmError
from slm.evaluate.metrics import Result, evaluate, read_results
from slm.generate.plan import seed_rows
from slm.rows import Row, read_rows, write_json

NAMES = ("majority", "rules", "base", "prompted_base", "larger")


def check_sets(settings, contract: Contract) -> dict[str, list[Row]]:
    """The four evaluation sets, checked: they parse, their answers keep the contract, no id, text or group is shared.
    Raises SlmError with every problem of the first kind found, file and row named."""
    sets = {name: read_rows(settings.path(f"data/eval/{name}.jsonl")) for name in registry.SETS}
    for name, rows in sets.items():
        if not rows:
            raise SlmError(f"data/eval/{name}.jsonl: no rows; write the evaluation set before anything else.")
        broken = [f"row {r.id}: {error}" for r in rows if (error := contract.parse(r.answer).error)]
        _refuse(f"data/eval/{name}.jsonl: answers that break the contract", broken)
    places = [("raw/seed", r) for r in seed_rows(settings)]
    places += [(f"eval/{name}", r) for name, rows in sets.items() for r in rows]
    for what, key in (("id", lambda r: r.id), ("text", lambda r: " ".join(r.user.lower().split()))):
        seen: dict[str, str] = {}
        twice = []
        for place, row in places:
            here = f"{place} row {row.id}"
            if key(row) in seen:
                twice.append(f"{seen[key(row)]} and {here}")
            seen[key(row)] = here
        _refuse(f"the same {what} twice", twice)
    homes: dict[str, str] = {}
    shared = [
        f"{row.meta.group} in {homes[row.meta.group]} and {name}" for name, rows in sets.items() for row in rows
        if row.meta.group and homes.setdefault(row.meta.group, name) != name
    ]  # fmt: skip
    _refuse("groups that stand in two evaluation sets", shared)
    return sets


def take(settings, rows: Sequence[Row]) -> list[Row]:
    """The rows that are evaluated: all, or `evaluate.limit` of them spread evenly over the file."""
    limit = settings.evaluate.limit
    if not limit or limit >= len(rows):
        return list(rows)
    return [rows[i * len(rows) // limit] for i in range(limit)]


def majority(rows: Sequence[Row], contract: Contract) -> dict:
    """The one output that is most often right: the commonest value of each field, or, where those do not go together,
    the commonest whole answer."""

    def commonest(values: list):
        texts = Counter(json.dumps(v, ensure_ascii=False) for v in values)
        return json.loads(texts.most_common(1)[0][0])

    values = [contract.parse(row.answer).value for row in rows]
    names = dict.fromkeys(name for value in values for name in value)
    mixed = {n: commonest([v.get(n) for v in values]) for n in names}
    return commonest(values) if contract.parse(json.dumps(mixed)).error else mixed


def choose_shots(rows: Sequence[Row], contract: Contract, count: int) -> list[Row]:
    """`count` seed rows for the prompt, one label after the other, the shortest of each label first."""
    pools: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda r: (len(r.user) < 25, len(r.user), r.id)):
        pools.setdefault(row.meta.category, []).append(row)
    picked: list[Row] = []
    while len(picked) < min(count, len(rows)):
        picked += [pool.pop(0) for pool in pools.values() if pool]
    return picked[:count]


def run_baseline(
    settings, contract: Contract, name: str, rows: Sequence[Row], set: str, *, predict: Callable[[str], dict],
    fewshot: Callable, latency: bool = True,
) -> Result:  # fmt: skip
    """One baseline on one set. `predict` is the rule program, `fewshot(contract, seed rows)` gives the better prompt's
    messages. A larger model that is not set, or does not answer, gives a Result with the reason."""
    from slm import models
    from slm.models.program import ProgramModel

    seeds, shots, endpoint = seed_rows(settings), (), None
    if name == "majority":
        constant = contract.dump(majority(seeds, contract))
        model = ProgramModel("majority", lambda text: constant, f"majority:{constant}")
    elif name == "rules":
        # Not contract.dump: an output that breaks the contract must be scored as one, not raise.
        dump = partial(json.dumps, ensure_ascii=False, separators=(",", ":"))
        model = ProgramModel("rules", lambda text: dump(predict(text)), f"rules:{_source_hash(predict)}")
    elif name not in NAMES:
        raise SlmError(f"--model {name}: there is no such baseline; choose one of {', '.join(NAMES)}.")
    else:
        if name != "base":  # the larger model gets the better prompt too
            shots = fewshot(contract, choose_shots(seeds, contract, settings.evaluate.fewshot))
        try:
            model = models.larger(settings) if name == "larger" else models.student(settings)
        except SlmError as error:
            if name != "larger":
                raise
            return Result(name=name, set=set, reason=str(error))
        if model is None:
            reason = "neither model.larger_gguf nor model.larger is set in project.yaml"
            return Result(name=name, set=set, reason=reason)
        endpoint = settings.model.larger if name == "larger" and not settings.model.larger_gguf else None
    try:
        return evaluate(
            settings, contract, model, rows, set=set, name=name, shots=shots, latency=latency, endpoint=endpoint
        )
    except SlmError as error:
        if endpoint is None:
            raise
        return Result(name=name, set=set, reason=str(error))


def run_baselines(
    settings, contract: Contract, sets: dict[str, list[Row]], *, predict: Callable[[str], dict], fewshot: Callable,
    known: Sequence[Result] = (),
) -> list[Result]:  # fmt: skip
    """Every baseline on every given set, set by set. Results in `known` are not run again; only dev is timed."""
    have = {(r.set, r.name): r for r in known if r.ran}
    results = []
    for set, rows in sets.items():
        for name in NAMES:
            found = have.get((set, name))
            if found is None or [s.row_id for s in found.scores] != [r.id for r in rows]:
                how = {"predict": predict, "fewshot": fewshot, "latency": set == "dev"}
                found = run_baseline(settings, contract, name, rows, set, **how)
            results.append(found)
    return results


def save_baselines(settings, contract: Contract, results: Sequence[Result]) -> Path:
    """Write `outputs/eval_reports/<run_id>/baselines.json`, predictions included, with what it was measured on, and
    the run's record in the registry."""
    path = settings.path(f"outputs/eval_reports/{settings.run_id}/baselines.json")
    key = {**_key(settings), "contract": contract.schema_hash}
    write_json(path, {"run_id": settings.run_id, "key": key, "results": [r.model_dump() for r in results]})
    registry.append(settings, "runs", {
        "stage": "baseline", "run_id": settings.run_id, "profile": settings.profile, "settings": settings.hash, **key,
        "metrics": {r.name: r.metrics[contract.primary_metric].model_dump() if r.ran else r.reason for r in results},
        "artefacts": {str(path.relative_to(settings.root)): registry.file_hash(path)},
    })  # fmt: skip
    return path


def require_baselines(settings) -> Path:
    """The newest baselines.json that was measured on today's sets and base model, this run's own first. Raises SlmError
    when 02_baseline was not run, or was run on other sets, another base or another row limit."""
    key = _key(settings)
    folder = settings.path("outputs/eval_reports")
    files = sorted(folder.glob("*/baselines.json"), key=lambda f: (f.parent.name == settings.run_id, f.stat().st_mtime))
    for file in reversed(files):
        found = _read(file)["key"]
        if all(found.get(k) == v for k, v in key.items()):
            return file
    what = "measured for another base model, evaluation set or row limit" if files else "no baselines yet"
    raise SlmError(f"{what}: run 02_baseline with this profile before training.")


def load_baselines(settings, contract: Contract) -> list[Result]:
    """The results of 02_baseline. Raises SlmError when they are missing or belong to another contract."""
    file = require_baselines(settings)
    if _read(file)["key"].get("contract") != contract.schema_hash:
        raise SlmError(f"{file}: measured under another contract; run 02_baseline again.")
    return read_results(file, "02_baseline")


def _key(settings) -> dict:
    return {
        "dev": registry.check_locked(settings)["dev"],
        "base": settings.model.base,
        "limit": settings.evaluate.limit,
        "max_new_tokens": settings.evaluate.max_new_tokens,
    }


def _read(file: Path) -> dict:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(record["key"], dict) and isinstance(record["results"], list):
            return record
    except (ValueError, KeyError, TypeError):
        pass
    raise SlmError(f"{file}: not a baselines file; delete it and run 02_baseline again.")


def _refuse(what: str, problems: list[str]) -> None:
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise SlmError(f"{what}: {'; '.join(problems[:5])}{more}. Mend the rows, then run 02_baseline again.")


def _source_hash(predict: Callable) -> str:
    """The rule program's module as a hash, so that a changed rule is asked again."""
    import hashlib
    import inspect

    module = inspect.getmodule(predict)
    source = inspect.getsource(module if module and module.__name__ != "__main__" else predict)
    return hashlib.sha256(source.encode()).hexdigest()[:16]
