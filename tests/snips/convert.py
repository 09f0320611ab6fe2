"""SNIPS files become a project's data: python tests/snips/convert.py <folder with train/valid/test.jsonl> <project>."""

import argparse
import json
import random
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path


def load(file: Path) -> list[dict]:
    """The lines of a SNIPS file, each with its place there; of equal texts only the first."""
    seen, found = set(), []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        record = json.loads(line)
        if key(record) not in seen:
            seen.add(key(record))
            found.append({**record, "place": f"{file.stem}:{number}"})
    return found


def key(record: dict) -> str:
    """What makes two requests the same: the words, without case and punctuation."""
    return " ".join(re.findall(r"\w+", record["text"].lower()))


def spread(records: list[dict], count: int, rng: random.Random) -> list[dict]:
    """`count` records, the tools in turn, otherwise at random."""
    pools = defaultdict(list)
    for record in rng.sample(records, len(records)):
        pools[record["tool"]].append(record)
    picked = []
    while len(picked) < count and any(pools.values()):
        picked += [pool.pop() for pool in pools.values() if pool]
    return picked[:count]


def splits(source: Path, train: int, seed: int = 0) -> dict[str, list[dict]]:
    """The project's sets. test: the 700 rows of the literature, less one text that is there twice. From valid, disjoint:
    adversarial (40 requests whose first word mostly means another tool), golden (42), dev (210). From train: seed (70)
    and `train` rows, leaks and all:
    the gates are to find them.
    """
    rng = random.Random(seed)
    sets = {name: load(source / f"{name}.jsonl") for name in ("train", "valid", "test")}
    first = defaultdict(Counter)
    for record in sets["train"]:
        first[key(record).split()[0]][record["tool"]] += 1
    known = {key(record) for record in sets["test"]}
    valid = [record for record in sets["valid"] if key(record) not in known]
    usual = {word: tools.most_common(1)[0][0] for word, tools in first.items()}
    hard = [r for r in valid if usual.get(key(r).split()[0], r["tool"]) != r["tool"]]
    found = {"test": sets["test"], "adversarial": spread(hard, 40, rng)}
    for name, count in (("golden", 42), ("dev", 210)):
        taken = {r["place"] for rows in found.values() for r in rows}
        found[name] = spread([r for r in valid if r["place"] not in taken], count, rng)
    known |= {key(record) for rows in found.values() for record in rows}
    found["seed"] = spread([r for r in sets["train"] if key(r) not in known], 70, rng)
    taken = {r["place"] for r in found["seed"]}
    found["train"] = spread([r for r in sets["train"] if r["place"] not in taken], train, rng)
    return found


def to_rows(records: list[dict], contract, kind: str = "production_like") -> list:
    """Rows of a project; the id is the record's file and line."""
    from slm.rows import make_row

    return [
        make_row(
            r["text"], contract.dump({"tool": r["tool"], "arguments": r["arguments"]}), id=r["place"].replace(":", "-"),
            category=r["tool"], kind=kind, source="human", provenance={"batch": "snips-2017-06"},
        )
        for r in records
    ]  # fmt: skip


def write(project: Path, found: dict[str, list[dict]], contract) -> dict[str, int]:
    """Write the sets where a project keeps them; returns how many rows each file has."""
    from slm.rows import write_rows

    homes = {"seed": "data/raw/seed.jsonl", "train": "data/generated/batch_001.jsonl"}
    counts = {}
    for name, records in found.items():
        rows = to_rows(records, contract, "near_miss" if name == "adversarial" else "production_like")
        file = homes.get(name, f"data/eval/{name}.jsonl")
        write_rows(project / file, rows)
        counts[file] = len(rows)
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("project", type=Path)
    parser.add_argument("--train", type=int, default=100_000, help="training rows at most, all by default")
    options = parser.parse_args()
    sys.path.insert(0, str(options.project.resolve()))
    from task.contract import contract

    for file, rows in write(options.project, splits(options.source, options.train), contract).items():
        print(f"{rows:6} {file}")
