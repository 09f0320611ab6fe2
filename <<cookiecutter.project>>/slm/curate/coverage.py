"""Gate 7, on the whole set: the shares of what the rows are, against the plan."""

from collections import Counter, defaultdict
from collections.abc import Iterable

from slm.generate.plan import KIND_SHARES, label_values
from slm.rows import DIFFICULTIES, Row

SHORT = 0.5  # a value with less than this share of its quota is short
COUNTED = ("category", "kind", "difficulty", "source", "language")


def tally(rows: Iterable[Row]) -> dict[str, Counter]:
    """Rows by each of COUNTED, by teacher, prompt and domain where the provenance names them, by whether they show an
    edge case (every kind but canonical), and by category and kind together ("cell"). One pass."""
    found: dict[str, Counter] = defaultdict(Counter)
    for row in rows:
        meta, made = row.meta, row.meta.provenance
        for name in COUNTED:
            found[name][getattr(meta, name)] += 1
        found["teacher"].update([made["teacher"]] if "teacher" in made else [])
        found["prompt"].update([made.get("prompt_version", made["prompt"])] if "prompt" in made else [])
        found["domain"][str(made.get("domain", "not recorded"))] += 1
        found["edge case"]["no" if meta.kind == "canonical" else "yes"] += 1
        found["cell"][meta.category, meta.kind] += 1
    return found


def coverage(found: dict[str, Counter], contract, languages: dict[str, float] | None = None):
    """What tally() found as a table: dimension, value, rows, share, quota (share planned; empty where nothing is
    planned) and verdict: "ok", "short" (less than half of the quota), "too many easy" (over 60 % easy) or "".
    `languages`: planned shares."""
    import pandas as pd

    labels = label_values(contract)
    quotas = {
        "category": dict.fromkeys(labels, 1 / len(labels)), "kind": KIND_SHARES,
        "difficulty": dict.fromkeys(DIFFICULTIES, 1 / len(DIFFICULTIES)), "domain": {}, "language": languages or {},
        "edge case": {"yes": 1 - KIND_SHARES["canonical"]}, "source": {},
    }  # fmt: skip
    lines = []
    for dimension, quota in quotas.items():
        counts = found[dimension]
        for value in dict.fromkeys([*quota, *sorted(counts)]):
            share, wanted = counts[value] / max(1, counts.total()), quota.get(value)
            verdict = "" if wanted is None else "short" if share < SHORT * wanted else "ok"
            verdict = "too many easy" if value == "easy" and share > 0.6 else verdict
            lines.append((dimension, value, counts[value], round(share, 3), wanted and round(wanted, 3), verdict))
    return pd.DataFrame(lines, columns=["dimension", "value", "rows", "share", "quota", "verdict"])


def cells(rows: Iterable[Row], contract):
    """Two tables, category by kind: the rows there are, and the rows that the plan's shares would give."""
    import pandas as pd

    found, labels = tally(rows)["cell"], label_values(contract)
    have = pd.DataFrame([[found[c, k] for k in KIND_SHARES] for c in labels], labels, list(KIND_SHARES))
    return have, have * 0.0 + [found.total() * share / len(labels) for share in KIND_SHARES.values()]
