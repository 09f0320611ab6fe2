"""Train, dev and test from the accepted rows: whole groups, each label in proportion, with a seed."""

import mmap
from array import array
from collections import Counter, defaultdict
from pathlib import Path

from slm import registry
from slm.curate.text import text_of
from slm.errors import SlmError
from slm.rows import digest, iter_rows, write_text

NAMES = ("train", "dev_internal", "test_internal")
SMALL, LARGE = (0.70, 0.15, 0.15), (0.80, 0.10, 0.10)


def deal(keys: list[str], labels: list[str], seed: int, small_dataset: int) -> list[list[int]]:
    """Row numbers for each of NAMES, from every row's group and label. Large groups are dealt first, equal ones by a
    seeded hash, each to the side where it adds least to the sum of (rows - wanted)^2 / wanted over its labels and the
    total. On a side rows stand in the order of the hash. Raises SlmError with fewer than three groups."""
    groups: dict[str, list[int]] = defaultdict(list)
    for n, key in enumerate(keys):
        groups[key].append(n)
    if len(groups) < 3:
        raise SlmError(f"split: {len(keys)} accepted rows in {len(groups)} groups; three groups are the least.")
    shares, total = SMALL if len(keys) < small_dataset else LARGE, {**Counter(labels), None: len(keys)}
    order = sorted(groups, key=lambda key: digest(f"{seed}:{key}", 64))
    filled, bare, side_of = [Counter() for _ in NAMES], [0, 1, 2], {}
    for place, key in enumerate(sorted(order, key=lambda key: -len(groups[key]))):  # a stable sort
        parts = [*Counter(labels[n] for n in groups[key]).items(), (None, len(groups[key]))]
        costs = [
            sum(count * ((2 * have[label] + count) / (share * total[label]) - 2) for label, count in parts)
            for share, have in zip(shares, filled, strict=True)
        ]
        # The last groups go to sides that have none.
        side = min(bare if len(order) - place <= len(bare) else range(3), key=costs.__getitem__)
        side_of[key], bare = side, [n for n in bare if n != side]
        filled[side].update(dict(parts))
    sides: list[list[int]] = [[] for _ in NAMES]
    for key in order:
        sides[side_of[key]] += groups[key]
    return sides


def join(ids: list[str], keys: list[str], links: list[tuple[str, str]]) -> list[str]:
    """The groups once more, those of every two linked row ids made one; an id that is not here is passed over."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    key_of, names = dict(zip(ids, keys, strict=True)), {key: n for n, key in enumerate(dict.fromkeys(keys))}
    pairs = [(names[key_of[a]], names[key_of[b]]) for a, b in links if a in key_of and b in key_of]
    if not pairs:
        return keys
    graph = coo_array(([1] * len(pairs), tuple(zip(*pairs, strict=True))), shape=(len(names), len(names)))
    part_of, first = dict(zip(names, connected_components(graph, directed=False)[1].tolist(), strict=True)), {}
    for key, part in part_of.items():
        first[part] = min(first.get(part, key), key)
    return [first[part_of[key]] for key in keys]


def split_file(settings, path: Path) -> dict:
    """Split a file of rows into train, dev_internal and test_internal beside it, lines as they stand; returns the
    split's record. A row without a group is its own; with `curate.split_by` cluster, groups of one cluster stay together;
    a row and its contrast (provenance.contrast_of) are not parted."""
    path, cfg = Path(path), settings.curate
    ids, keys, labels, texts, links, starts = [], [], [], [], [], array("q")
    for row in iter_rows(path):
        ids.append(row.id)
        keys.append(row.meta.group or row.id)
        labels.append(row.meta.category)
        texts += [text_of(row)] if cfg.split_by == "cluster" else []
        if isinstance(twin := row.meta.provenance.get("contrast_of"), str):
            links.append((row.id, twin))
    if twice := len(ids) - len(set(ids)):
        raise SlmError(f"{path}: {twice} rows have the id of another row; ids must be unique.")
    if texts:
        from slm.curate.clusters import cluster_ids

        home: dict[str, str] = {}  # a group goes where its first row is
        keys = [home.setdefault(key, f"cluster {n}") for key, n in zip(keys, cluster_ids(texts, settings), strict=True)]
    sides = dict(zip(NAMES, deal(join(ids, keys, links), labels, cfg.seed, cfg.small_dataset), strict=True))
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as text:
        position = 0
        for line in stream:
            if line.strip():
                starts.append(position)
            position += len(line)

        def line_at(n: int) -> str:
            text.seek(starts[n])
            return text.readline().decode().strip() + "\n"

        for name, side in sides.items():
            write_text(path.with_name(f"{name}.jsonl"), map(line_at, side))
    return {
        "seed": cfg.seed, "rule": f"whole {cfg.split_by}s, labels in proportion; 70/15/15 below small_dataset, else 80/10/10",
        "small_dataset": cfg.small_dataset, "shares": list(SMALL if len(ids) < cfg.small_dataset else LARGE),
        "rows": {name: len(side) for name, side in sides.items()},
        "labels": {name: dict(sorted(Counter(labels[n] for n in side).items())) for name, side in sides.items()},
        "files": {name: registry.file_hash(path.with_name(f"{name}.jsonl"))[:16] for name in NAMES},
    }  # fmt: skip
