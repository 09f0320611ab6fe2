"""Dataset versions: a content hash with all that it was made from; compared, and made again to the last byte."""

import gzip
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from filelock import FileLock

from slm import registry
from slm.curate.coverage import COUNTED, tally
from slm.curate.split import split_file
from slm.errors import SlmError
from slm.rows import iter_rows

# What decides, besides the parents, which rows are accepted.
DECIDING = ("data/raw/seed.jsonl", "data/raw/decisions.jsonl", "data/eval/*.jsonl", "registry/judge.jsonl", "task/contract.py",
            "task/checks.py", "task/prompts.py")  # fmt: skip
STAGES = (
    (50, "seed set (50-200)", "define the task and its output contract"),
    (500, "first training run (500-2,000)", "prove that the behaviour can be learnt"),
    (2_000, "serious v1 (2,000-10,000)", "cover categories and edge cases"),
    (10_000, "production v1 (10,000-100,000+)", "use logs, targeted repair and a balanced distribution"),
)  # fmt: skip


def writing(settings) -> FileLock:
    """The lock under which data/accepted is written, split and recorded: two runs at once take turns."""
    settings.path(".cache/locks").mkdir(parents=True, exist_ok=True)
    return FileLock(settings.path(".cache/locks/accepted.lock"))


def record_dataset(settings, path: Path, split: dict, parents: dict, gates: list[dict]) -> dict:
    """The dataset's line in registry/datasets.jsonl; the version is the content hash of `path`, whose rows are kept once
    in registry/datasets/<version>.jsonl.gz. The same rows, split and inputs are not recorded twice."""
    version, found, last = registry.file_hash(path)[:12], tally(iter_rows(path)), registry.latest(settings, "datasets")
    deciding = sorted(str(f.relative_to(settings.root)) for pattern in DECIDING for f in settings.root.glob(pattern))
    record = {
        "version": version, "previous": last["version"] if last else None,
        "file": str(Path(path).relative_to(settings.root)), "rows": found["category"].total(), "parents": parents,
        "inputs": {name: _identity(settings.path(name)) for name in dict.fromkeys([*parents, *deciding])},
        "counts": {name: dict(sorted(found[name].items())) for name in COUNTED}, "gates": gates, "split": split,
        "teachers": dict(found["teacher"].most_common()), "prompts": dict(found["prompt"].most_common()),
        "config": settings.model_dump(mode="json", exclude={"profile", "run_id"}),
        "run_id": settings.run_id, "profile": settings.profile, "settings": settings.hash,
    }  # fmt: skip
    _keep(settings, path, version)
    if last and all(last.get(key) == record[key] for key in ("version", "split", "parents", "inputs")):
        return last
    return registry.append(settings, "datasets", record)


def split_and_record(settings, path: Path) -> dict:
    """Split an accepted file and record it; parents and gates are those of the last record, where 04 wrote one."""
    last, path = registry.latest(settings, "datasets") or {"parents": {}, "gates": []}, settings.path(path)
    with writing(settings):
        return record_dataset(settings, path, split_file(settings, path), last["parents"], last["gates"])


def find(settings, version: str) -> dict:
    """The newest record of a version, which its first digits may name. Raises SlmError with the versions there are."""
    records = {record["version"]: record for record in registry.read(settings, "datasets")}
    matches = [record for name, record in records.items() if version and name.startswith(version)]
    if len(matches) != 1:
        known = ", ".join(records) or "none yet; run 04_curate"
        raise SlmError(f"dataset {version!r}: {'more than one' if matches else 'no'} such version; there are: {known}.")
    return matches[0]


def diff(settings, old: str | None, new: str) -> SimpleNamespace:
    """What became of version `old` (None: of nothing) in `new`, by message: .added and .removed (row ids), .changed
    ((id, old answer, new answer)), .summary (a sentence), .table (rows and shares per category and kind). Raises
    SlmError when the rows of a version are not here."""
    import pandas as pd

    before, after = _held(settings, old), _held(settings, new)
    added = [row[0] for key, row in after.items() if key not in before]
    removed = [row[0] for key, row in before.items() if key not in after]
    both = [(row, before[key]) for key, row in after.items() if key in before]
    changed = [(now[0], was[1], now[1]) for now, was in both if now[1] != was[1]]
    lines = []
    for place, dimension in ((2, "category"), (3, "kind")):
        was, now = (Counter(row[place] for row in held.values()) for held in (before, after))
        for value in sorted(was | now):
            shift = 100 * (now[value] / max(1, now.total()) - was[value] / max(1, was.total()))
            lines.append((dimension, value, was[value], now[value], now[value] - was[value], round(shift, 1)))
    table = pd.DataFrame(lines, columns=["dimension", "value", "before", "after", "change", "shift (points)"])
    summary = f"{len(added)} rows added, {len(removed)} removed, {len(changed)} answered differently"
    return SimpleNamespace(added=added, removed=removed, changed=changed, table=table, summary=summary)


def reproduce(settings, version: str, run: Callable[[Path, dict], object]) -> dict:
    """Make a version again in a folder of its own, where the record's inputs lie, checked by hash: `run(folder, config)`
    must leave data/accepted/all.jsonl there. Returns the record. Raises SlmError that names a changed input, or when
    the rows come out otherwise."""
    record = find(settings, version)
    if "inputs" not in record:
        raise SlmError(f"dataset {version}: its record names no inputs (it is from an older release); run 04_curate.")
    with tempfile.TemporaryDirectory(dir=settings.path(".cache"), prefix="reproduce-") as folder:
        for file, known in record["inputs"].items():
            source, copy = settings.path(file), Path(folder, file)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if source.is_file():
                shutil.copyfile(source, copy)
                if file.endswith(".jsonl") and copy.stat().st_size > known["bytes"]:
                    os.truncate(copy, known["bytes"])  # batches and decisions only grow: their beginning is what they were
            if not source.is_file() or _identity(copy) != known:
                raise SlmError(f"{file}: not what version {record['version']} was made from; bring that file back (git), run again.")
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
    return f"{text} Next: {start - n:,} more for the {name}, to {goal}" + ("." if n < 500 else ", once these rows move the metric.")


def volume_warning(settings, planned: int) -> str:
    """A warning when thousands of rows are planned and no run is recorded yet; else nothing."""
    if planned < 2_000 or registry.read(settings, "runs"):
        return ""
    return f"WARNING: {planned:,} rows are planned and no run is recorded: first show that 500 move the metric (05, 06)."


def _identity(path: Path) -> dict:
    return {"hash": registry.file_hash(path)[:16], "bytes": path.stat().st_size}


def _archive(settings, version: str) -> Path:
    return settings.path(f"registry/datasets/{version}.jsonl.gz")


def _keep(settings, path: Path, version: str) -> None:
    target = _archive(settings, version)
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        temporary = target.with_suffix(f".{os.getpid()}")
        with Path(path).open("rb") as source, gzip.GzipFile(temporary, "wb", compresslevel=4, mtime=0) as stream:
            shutil.copyfileobj(source, stream, 1 << 20)
        os.replace(temporary, target)


def _held(settings, version: str | None) -> dict[str, tuple[str, str, str, str]]:
    """Id, answer, category and kind of every row, by what comes before the answer."""
    held: dict[str, tuple] = {}
    file = _archive(settings, find(settings, version)["version"]) if version else None
    if file and not file.is_file():
        raise SlmError(f"{file.name}: not in registry/datasets (git leaves it out); python -m slm dataset reproduce makes it again.")
    with gzip.open(file or os.devnull) as stream:
        for row in map(json.loads, stream):
            key, answer = json.dumps(row["messages"][:-1]), row["messages"][-1]["content"]
            answer += f" (rejected: {row['rejected']})" if row.get("rejected") else ""
            held[key + row["id"] if key in held else key] = (row["id"], answer, row["meta"]["category"], row["meta"].get("kind", ""))
    return held
