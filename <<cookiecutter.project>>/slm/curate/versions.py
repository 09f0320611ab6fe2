"""Dataset versions: a content hash with all that it was made from; compared, and made again to the last byte."""

import gzip
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

from filelock import FileLock

from slm import registry
from slm.curate.coverage import COUNTED, tally
from slm.curate.split import split_file
from slm.errors import SlmError
from slm.rows import iter_rows, replacing

# What decides, besides the parents, which rows are accepted.
DECIDING = ("data/raw/seed.jsonl", "data/raw/decisions.jsonl", "data/eval/*.jsonl", "registry/judge.jsonl",
            "registry/forgotten.jsonl", "task/contract.py", "task/checks.py", "task/prompts.py")  # fmt: skip
STAGES = (
    (50, "seed set (50-200)", "settle what is asked and what an answer looks like"),
    (500, "first training run (500-2,000)", "see whether the behaviour can be learnt at all"),
    (2_000, "serious v1 (2,000-10,000)", "reach every category and edge case"),
    (10_000, "production v1 (10,000-100,000+)", "grow from logs and repairs, kept in balance"),
)  # fmt: skip


def writing(settings) -> FileLock:
    """The lock under which data/accepted is written, split and recorded: two runs at once take turns."""
    return registry.locked(settings, "accepted")


def record_dataset(
    settings, path: Path, split: dict, parents: Iterable[str], gates: list[dict], found: dict | None = None
) -> dict:
    """The dataset's line in registry/datasets.jsonl; the version is the content hash of `path`, whose rows are kept once
    in registry/datasets/<version>.jsonl.gz; `found` is their tally. The same rows, split and inputs are not recorded
    twice."""
    version, last = registry.file_hash(path)[:12], registry.latest(settings, "datasets")
    found = found or tally(iter_rows(path))
    deciding = sorted(str(f.relative_to(settings.root)) for pattern in DECIDING for f in settings.root.glob(pattern))
    inputs = {name: _identity(settings.path(name)) for name in dict.fromkeys([*parents, *deciding])}
    record = {
        "version": version, "previous": last["version"] if last else None,
        "file": str(Path(path).relative_to(settings.root)), "rows": found["category"].total(),
        "parents": {name: inputs[name]["hash"] for name in parents}, "inputs": inputs,
        "counts": {name: dict(sorted(found[name].items())) for name in COUNTED}, "gates": gates, "split": split,
        "teachers": dict(found["teacher"].most_common()), "prompts": dict(found["prompt"].most_common()),
        "config": settings.model_dump(mode="json", exclude={"profile", "run_id"}),
        "run_id": settings.run_id, "profile": settings.profile, "settings": settings.hash,
    }  # fmt: skip
    _keep(settings, path, version)
    if last and all(last.get(key) == record[key] for key in ("version", "split", "parents", "inputs")):
        return last
    return registry.append(settings, "datasets", record)


def find(settings, version: str) -> dict:
    """The newest record of a version, which its first digits may name. Raises SlmError with the versions there are."""
    records = {record["version"]: record for record in registry.read(settings, "datasets")}
    matches = [record for name, record in records.items() if version and name.startswith(version)]
    if len(matches) != 1:
        known = ", ".join(records) or "none yet; run 04_curate"
        raise SlmError(f"dataset {version!r}: {'more than one' if matches else 'no'} such version; there are: {known}.")
    return matches[0]


def split_of(settings, name: str) -> Path:
    """The file of a split's side: data/accepted/<name>.jsonl, or with `train.dataset` that version's own, cut once more
    from its kept rows in .cache/datasets. Raises SlmError when it does not come out as recorded."""
    if not settings.train.dataset:
        return settings.path(f"data/accepted/{name}.jsonl")
    record = find(settings, settings.train.dataset)
    folder = settings.path(f".cache/datasets/{record['version']}-{record['hash']}")
    with registry.locked(settings, f"dataset-{record['version']}"):
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=settings.path(".cache")) as work, _rows(settings, record["version"]) as rows:
                file = Path(work, "split/all.jsonl")
                with replacing(file) as stream:
                    shutil.copyfileobj(rows, stream)
                own = settings.curate.model_validate(record["config"]["curate"])
                if split_file(settings.model_copy(update={"curate": own}), file)["files"] != record["split"]["files"]:
                    raise SlmError(f"dataset {record['version']}: its split comes out otherwise now; run 04_curate again.")
                folder.parent.mkdir(exist_ok=True)
                file.parent.rename(folder)
    return folder / f"{name}.jsonl"


def diff(settings, old: str | None, new: str) -> SimpleNamespace:
    """What became of version `old` (None: of nothing) in `new`, by message: .added and .removed (row ids), .changed (a
    table: id, answers before and after), .table (rows and shares per category and kind), .summary (a sentence). Raises
    SlmError when the rows of a version are not here."""
    import pandas as pd

    before, after = _held(settings, old), _held(settings, new)
    both = before.merge(after, "outer", ["message", "n"], suffixes=(" before", " after"), indicator="in")
    added, removed = both.loc[both["in"] == "right_only", "id after"], both.loc[both["in"] == "left_only", "id before"]
    changed = both.loc[(both["in"] == "both") & (both["answer before"] != both["answer after"])]
    parts = []
    for dimension in ("category", "kind"):
        part = pd.DataFrame({"before": before[dimension].value_counts(), "after": after[dimension].value_counts()})
        part = part.fillna(0).astype(int).sort_index()
        shares = 100 * part / part.sum().clip(lower=1)
        parts.append(part.assign(change=part.after - part.before, shift=(shares.after - shares.before).round(1)))
    return SimpleNamespace(
        added=list(added), removed=list(removed), changed=changed[["id after", "answer before", "answer after"]],
        table=pd.concat(parts, keys=("category", "kind"), names=("", "value")).rename(columns={"shift": "shift (points)"}),
        summary=f"{len(added)} rows added, {len(removed)} removed, {len(changed)} answered differently",
    )  # fmt: skip


def reproduce(settings, version: str, run: Callable[[Path, dict], object]) -> dict:
    """Make a version again in a folder of its own, where the record's inputs lie, checked by hash: `run(folder, config)`
    must leave data/accepted/all.jsonl there. Returns the record. Raises SlmError that names a changed input, or when
    the rows come out otherwise."""
    record = find(settings, version)
    settings.path(".cache").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=settings.path(".cache"), prefix="reproduce-") as folder:
        for file, known in record["inputs"].items():
            source, copy = settings.path(file), Path(folder, file)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if source.is_file():
                shutil.copyfile(source, copy)
                # Batches and decisions only grow: their beginning is what they were.
                if file.endswith(".jsonl") and copy.stat().st_size > known["bytes"]:
                    os.truncate(copy, known["bytes"])
            if not source.is_file() or _identity(copy) != known:
                problem = f"not what version {record['version']} was made from; bring that file back (git)"
                raise SlmError(f"{file}: {problem}, then run again.")
        run(Path(folder), record["config"])
        made = Path(folder, "data/accepted/all.jsonl")
        if (got := registry.file_hash(made)[:12]) != record["version"]:
            cause = "slm/curate, the notebook or a package has changed"
            raise SlmError(f"dataset {record['version']}: the same inputs and settings now give {got}; {cause}.")
        _keep(settings, made, got)
    return record


def split_table(record: dict):
    """A table, one line per label: rows on each side, and how far its share strays there at most from the whole's."""
    import pandas as pd

    table = pd.DataFrame(record["split"]["labels"]).fillna(0).astype(int).sort_index()
    whole = table.sum(axis=1) / table.to_numpy().sum()
    strays = (100 * table / table.sum()).sub(100 * whole, axis=0).abs().max(axis=1).round(1)
    return table.assign(**{"strays by (points)": strays})


def volume_stage(n: int) -> str:
    """What `n` rows are enough for, and what comes next (the workflow's volume heuristics)."""
    reached = [stage for stage in STAGES if n >= stage[0]]
    text = f"{n:,} rows: {reached[-1][1]}, to {reached[-1][2]}." if reached else f"{n:,} rows: less than a seed set."
    if len(reached) == len(STAGES):
        return text
    start, name, goal = STAGES[len(reached)]
    proviso = "" if n < 500 else ", once these rows move the metric"
    return f"{text} Next: {start - n:,} more for the {name}, to {goal}{proviso}."


def volume_warning(settings, planned: int) -> str:
    """A warning when thousands of rows are planned and no run is recorded yet; else nothing."""
    text = f"WARNING: {planned:,} rows are planned and no run is recorded: first show that 500 move the metric."
    return "" if planned < 2_000 or registry.read(settings, "runs") else text


def _identity(path: Path) -> dict:
    return {"hash": registry.file_hash(path)[:16], "bytes": path.stat().st_size}


def _archive(settings, version: str) -> Path:
    return settings.path(f"registry/datasets/{version}.jsonl.gz")


def _keep(settings, path: Path, version: str) -> None:
    target = _archive(settings, version)
    if not target.exists():
        with path.open("rb") as rows, replacing(target) as stream, gzip.GzipFile("", "wb", 4, stream, 0) as packed:
            shutil.copyfileobj(rows, packed, 1 << 20)


def _rows(settings, version: str):
    """The kept rows of a version as an open stream. Raises SlmError when they are not here."""
    file = _archive(settings, find(settings, version)["version"])
    if not file.is_file():
        hint = "`python -m slm dataset reproduce` makes it again"
        raise SlmError(f"{file.name}: not in registry/datasets (git leaves it out); {hint}.")
    return gzip.open(file)


def _held(settings, version: str | None):
    """A table of a version's rows: message (a hash of all before the answer), id, answer, category, kind, and n, which
    counts the rows of one message."""
    import pandas as pd

    lines = []
    with _rows(settings, version) if version else gzip.open(os.devnull) as stream:
        for row in map(json.loads, stream):
            *before, last = row["messages"]
            facts = row["meta"]["category"], row["meta"].get("kind", "canonical")
            lines.append((hash(json.dumps(before)), row["id"], last["content"] + row.get("rejected", ""), *facts))
    frame = pd.DataFrame(lines, columns=["message", "id", "answer", "category", "kind"])
    return frame.assign(n=frame.groupby("message").cumcount())
