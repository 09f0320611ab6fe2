"""Gate 7, on the whole set: the shares of categories, kinds, difficulties, languages and sources, against the plan."""

from collections import Counter

from slm.generate.plan import KIND_SHARES, label_values
from slm.rows import DIFFICULTIES, Row

SHORT = 0.5  # a value with less than this share of its quota is short


def coverage(rows: list[Row], contract):
    """A table: dimension, value, rows, share, quota (share planned; None where nothing is planned) and verdict.
    Verdicts are "ok", "short" (less than half of the quota), "too many easy" (over 60 % easy) and ""."""
    import pandas as pd

    labels = label_values(contract)
    planned = {
        "category": dict.fromkeys(labels, 1 / len(labels)),
        "kind": KIND_SHARES,
        "difficulty": dict.fromkeys(DIFFICULTIES, 1 / len(DIFFICULTIES)),
        "language": {},
        "source": {},
    }
    lines = []
    for dimension, quota in planned.items():
        counts = Counter(getattr(row.meta, dimension) for row in rows)
        for value in dict.fromkeys([*quota, *sorted(counts)]):
            share = counts[value] / len(rows) if rows else 0.0
            wanted = quota.get(value)
            verdict = "" if wanted is None else "short" if share < SHORT * wanted else "ok"
            if value == "easy" and share > 0.6:
                verdict = "too many easy"
            line = {"dimension": dimension, "value": value, "rows": counts[value], "share": round(share, 3)}
            lines.append(line | {"quota": None if wanted is None else round(wanted, 3), "verdict": verdict})
    return pd.DataFrame(lines)


def counts(rows: list[Row]) -> dict[str, dict[str, int]]:
    """Rows by category, kind, difficulty, source and language, for the dataset record."""
    names = ("category", "kind", "difficulty", "source", "language")
    return {name: dict(sorted(Counter(getattr(row.meta, name) for row in rows).items())) for name in names}
