"""What must be beaten: the evaluation sets checked and locked, and every baseline on the same rows."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path

from slm import registry
from slm.contract import Contract
from slm.curate.versions import split_of
from slm.errors import SlmError, listed
from slm.evaluate import classical, retrieve
from slm.evaluate.metrics import Result, evaluate, read_results
from slm.generate.plan import seed_rows
from slm.rows import Row, digest, plain, read_rows, write_json

NAMES = ("majority", "rules", "classical", "base", "prompted_base", "prompted_constrained", "rag", "larger")
PROGRAMS = NAMES[:3]  # quick, and changed by an edited rule or new training rows: always run again


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
    for what, key in (("id", lambda r: r.id), ("text", lambda r: plain(r.user))):
        seen: dict[str, list[str]] = {}
        for place, row in places:
            seen.setdefault(key(row), []).append(f"{place} row {row.id}")
        _refuse(f"the same {what} twice", [" and ".join(where) for where in seen.values() if len(where) > 1])
    homes = sorted({(row.meta.group, name) for name, rows in sets.items() for row in rows if row.meta.group})
    shared = [f"{group} in {one} and {two}" for (group, one), (same, two) in pairwise(homes) if group == same]
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
    fewshot: Callable, latency: bool = True, train: bool = False,
) -> Result:  # fmt: skip
    """One baseline on one set. `predict` is the rule program, `fewshot(contract, seed rows)` gives the better prompt's
    messages; with `train` the classical model is fitted on the run's training rows, else on the seed rows. A baseline
    that does not apply, or whose endpoint does not answer, gives a Result with the reason. Raises SlmError for
    evaluation rows in the prompt."""
    if name not in NAMES:
        raise SlmError(f"--model {name}: there is no such baseline; choose one of {', '.join(NAMES)}.")
    return _run(settings, contract, name, rows, set, _opener(settings, contract, predict, train), fewshot, latency)


def run_baselines(
    settings, contract: Contract, sets: dict[str, list[Row]], *, predict: Callable[[str], dict], fewshot: Callable,
    known: Sequence[Result] = (), train: bool = False,
) -> list[Result]:  # fmt: skip
    """Every baseline on every given set, set by set. Models in `known` that answered the same rows of the same file are
    not run again; only dev is timed. `train`: see `run_baseline`."""
    have = {(r.set, r.name): r for r in known if r.ran and r.name not in PROGRAMS}
    opened, results = _opener(settings, contract, predict, train), {}
    for name in NAMES:  # the outer loop: a model is loaded once for all sets, and let go before the next
        for set, rows in sets.items():
            found, file = have.get((set, name)), settings.path(f"data/eval/{set}.jsonl")
            same = found and [s.row_id for s in found.scores] == [r.id for r in rows]
            if not same or found.set_hash != registry.file_hash(file):
                found = _run(settings, contract, name, rows, set, opened, fewshot, set == "dev")
            results[set, name] = found
    return [results[set, name] for set in sets for name in NAMES]


def _run(settings, contract: Contract, name: str, rows: Sequence[Row], set: str, opened, fewshot, latency) -> Result:
    held = name == "prompted_constrained"
    reason = not_held(settings, set) if held else ""
    if name == "rag" and not settings.task.needs_knowledge:
        reason = "the task needs no documents (task.needs_knowledge)"
    if reason:
        return Result(name=name, set=set, reason=reason)
    shots = [] if name in (*PROGRAMS, "base") else better_prompt(settings, contract, fewshot)
    endpoint = settings.model.larger if name == "larger" and not settings.model.larger_gguf else None
    try:
        model = opened(name if name in (*PROGRAMS, "larger") else "student")
        if name == "rag":
            model = retrieve.RetrievingModel(model, retrieve.read_passages(settings), settings.evaluate.retrieve)
        return evaluate(
            settings, contract, model, rows, set=set, name=name, shots=shots, latency=latency, endpoint=endpoint,
            constrained=held,
        )  # fmt: skip
    except SlmError as error:
        if name not in ("classical", "larger") and not held:
            raise
        return Result(name=name, set=set, reason=str(error))


def not_held(settings, set: str) -> str:
    """Why nothing is decoded under the schema on a set; empty where it is."""
    if not settings.evaluate.constrained:
        return "evaluate.constrained is off"
    return "" if set in ("dev", "test") else "decoding held to the schema is measured on dev and test"


def better_prompt(settings, contract: Contract, fewshot: Callable) -> list[dict]:
    """The messages of the better prompt, its examples chosen among the seed rows. Raises SlmError that names the
    evaluation rows that stand in it all the same."""
    shots = fewshot(contract, choose_shots(seed_rows(settings), contract, settings.evaluate.fewshot))
    said = {message["content"] for message in shots if message["role"] == "user"}
    files = [settings.path(f"data/eval/{name}.jsonl") for name in registry.SETS]
    shown = [f"{f.name} row {r.id}" for f in files if f.is_file() for r in read_rows(f) if r.user in said]
    _refuse("evaluation rows in the prompt of the prompted base", shown)
    return shots


def _opener(settings, contract: Contract, predict: Callable[[str], dict], train: bool) -> Callable:
    """A function from a model's name to the model; it holds one at a time, and raises SlmError where there is none."""
    from slm import models
    from slm.models.program import ProgramModel

    @lru_cache(maxsize=1)
    def opened(name: str):
        if name == "majority":
            constant = contract.dump(majority(seed_rows(settings), contract))
            return ProgramModel(name, lambda text: constant, f"majority:{constant}")
        if name == "rules":
            # Not contract.dump: an output that breaks the contract must be scored as one, not raise.
            dump = partial(json.dumps, ensure_ascii=False, separators=(",", ":"))
            return ProgramModel(name, lambda text: dump(predict(text)), f"rules:{_source_hash(predict)}")
        if name == "classical":
            return classical.fit(training_rows(settings) if train else seed_rows(settings), contract, majority)
        if name == "larger" and not (larger := models.larger(settings)):
            raise SlmError("neither model.larger_gguf nor model.larger is set in project.yaml")
        return larger if name == "larger" else models.student(settings)

    return opened


def training_rows(settings) -> list[Row]:
    """The rows that the run was trained on. Raises SlmError when data/accepted/train.jsonl holds others by now."""
    file, run = split_of(settings, "train"), settings.run_id
    trained = registry.latest(settings, "runs", stage="train", status="completed", run_id=run)
    version = trained and trained["parents"]["dataset"]
    record = registry.latest(settings, "datasets", version=version)
    if not file.is_file() or not record or record["split"]["files"]["train"] != registry.file_hash(file)[:16]:
        raise SlmError(f"{file}: not what run {run} was trained on (dataset {version}); train again")
    return read_rows(file)


def save_baselines(settings, contract: Contract, results: Sequence[Result]) -> Path:
    """Write `outputs/eval_reports/<run_id>/baselines.json`, predictions included, with what it was measured on, and
    the run's record in the registry with the scores on dev. 06 writes it again with the other sets."""
    path = settings.path(f"outputs/eval_reports/{settings.run_id}/baselines.json")
    key, primary = {**_key(settings), "contract": contract.schema_hash}, contract.primary_metric
    write_json(path, {"run_id": settings.run_id, "key": key, "results": [r.model_dump() for r in results]})
    dev = [r for r in results if r.set == "dev"]
    registry.append(settings, "runs", {
        "stage": "baseline", "run_id": settings.run_id, "profile": settings.profile, "settings": settings.hash, **key,
        "metrics": {r.name: r.metrics[primary].model_dump() if r.ran else r.reason for r in dev},
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
        if key.items() <= _measured_on(file).items():
            return file
    what = "no baselines yet"
    if files:
        what = "measured for another base model, evaluation set, row limit or number of examples"
    raise SlmError(f"{what}: run 02_baseline with this profile before training.")


def load_baselines(settings, contract: Contract) -> list[Result]:
    """The results of 02_baseline. Raises SlmError when they are missing or belong to another contract."""
    file = require_baselines(settings)
    if _measured_on(file).get("contract") != contract.schema_hash:
        raise SlmError(f"{file}: measured under another contract; run 02_baseline again.")
    return read_results(file, "02_baseline")


def _key(settings) -> dict:
    return {
        "dev": registry.check_locked(settings)["dev"],
        "base": settings.model.base,
        "limit": settings.evaluate.limit,
        "max_new_tokens": settings.evaluate.max_new_tokens,
        "fewshot": settings.evaluate.fewshot,
    }


def _measured_on(file: Path) -> dict:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8"))["key"])
    except (ValueError, KeyError, TypeError):
        raise SlmError(f"{file}: not a baselines file; delete it and run 02_baseline again.") from None


def _refuse(what: str, problems: list[str]) -> None:
    if problems:
        raise SlmError(f"{what}: {listed(problems, between='; ')}. Mend the rows, then run 02_baseline again.")


def _source_hash(predict: Callable) -> str:
    """The rule program's module as a hash, so that a changed rule is asked again."""
    import inspect

    module = inspect.getmodule(predict)
    source = inspect.getsource(module if module and module.__name__ != "__main__" else predict)
    return digest(source, 16)
