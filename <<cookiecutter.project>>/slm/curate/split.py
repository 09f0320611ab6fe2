"""Train, dev and test from the accepted rows: by group, with a seed, no group on two sides."""

import hashlib
from collections import defaultdict
from pathlib import Path

from slm import registry
from slm.curate.coverage import counts
from slm.errors import SlmError
from slm.rows import Row, read_rows, write_rows

NAMES = ("train", "dev_internal", "test_internal")
SMALL, LARGE = (0.70, 0.15, 0.15), (0.80, 0.10, 0.10)


def split_rows(rows: list[Row], seed: int, small_dataset: int) -> dict[str, list[Row]]:
    """70/15/15 below `small_dataset` rows, 80/10/10 from there on. Groups are dealt in the order of a seeded hash. A
    row without a group is a group of its own. Raises SlmError with fewer than three groups."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.meta.group or row.id].append(row)
    if len(groups) < 3:
        raise SlmError(f"split: {len(rows)} accepted rows in {len(groups)} groups; three groups are the least.")
    shares = SMALL if len(rows) < small_dataset else LARGE
    order = sorted(groups, key=lambda group: hashlib.sha256(f"{seed}:{group}".encode()).digest())
    sides: dict[str, list[Row]] = {name: [] for name in NAMES}
    for place, group in enumerate(order):
        left = len(order) - place
        # The side that is furthest below its share takes the group; the last groups go to sides that have none.
        bare = [name for name in NAMES if not sides[name]]
        open_sides = bare if left <= len(bare) else NAMES
        lack = {n: s * len(rows) - len(sides[n]) for n, s in zip(NAMES, shares, strict=True)}
        sides[max(open_sides, key=lambda name: lack[name] / len(rows))].extend(groups[group])
    return sides


def split_file(settings, path: Path) -> dict:
    """Split an accepted file into train, dev_internal and test_internal beside it; returns the split's record."""
    path = Path(path)
    sides = split_rows(read_rows(path), settings.curate.seed, settings.curate.small_dataset)
    for name, rows in sides.items():
        write_rows(path.with_name(f"{name}.jsonl"), rows)
    total = sum(map(len, sides.values()))
    return {
        "seed": settings.curate.seed,
        "rule": "by group; 70/15/15 below small_dataset, else 80/10/10",
        "small_dataset": settings.curate.small_dataset,
        "shares": list(SMALL if total < settings.curate.small_dataset else LARGE),
        "rows": {name: len(rows) for name, rows in sides.items()},
        "files": {name: registry.file_hash(path.with_name(f"{name}.jsonl"))[:16] for name in sides},
    }


def record_dataset(settings, path: Path, split: dict, parents: dict, gates: list[dict]) -> dict:
    """The dataset's line in registry/datasets.jsonl; the version is the content hash of `path`. An unchanged dataset
    with an unchanged split is not recorded twice."""
    rows = read_rows(path)
    version = registry.file_hash(path)[:12]
    last = registry.latest(settings, "datasets")
    if last and last["version"] == version and last["split"] == split and last["parents"] == parents:
        return last
    record = {
        "version": version, "previous": last["version"] if last else None,
        "file": str(Path(path).relative_to(settings.root)), "rows": len(rows), "parents": parents,
        "counts": counts(rows), "gates": gates, "split": split,
        "run_id": settings.run_id, "profile": settings.profile, "settings": settings.hash,
    }  # fmt: skip
    return registry.append(settings, "datasets", record)


def split_and_record(settings, path: Path) -> dict:
    """Split an accepted file and record it; parents and gates are those of the last record, where 04 wrote one."""
    last = registry.latest(settings, "datasets") or {"parents": {}, "gates": []}
    path = settings.path(path)
    return record_dataset(settings, path, split_file(settings, path), last["parents"], last["gates"])
