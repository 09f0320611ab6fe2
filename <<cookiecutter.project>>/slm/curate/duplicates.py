"""The gates that judge a row by its neighbours: contradictions (9) and duplicates (5)."""

from slm.curate.read import Verdict
from slm.curate.text import Pair, text_of
from slm.rows import Row

Verdicts = list[Verdict | None]


def contradictions(
    rows: list[Row], values: list[dict], pairs: list[Pair], threshold: float, trusted: frozenset[str] = frozenset()
) -> Verdicts:
    """Gate 9: alike messages with answers that differ, other than by what each copied from its own message. A `trusted`
    row (by id: seed rows, human rows) wins over another; else both go, for neither can be believed. A contrast made on
    purpose says so: provenance.contrast_of names its twin."""
    verdicts: Verdicts = [None] * len(rows)
    for pair in pairs:
        a, b = rows[pair.first], rows[pair.second]
        if pair.similarity < threshold or _contrast(a, b):
            continue
        field = differing(a, values[pair.first], b, values[pair.second])
        if field is None:
            continue
        sure = [row.id in trusted for row in (a, b)]
        for mine, other, index in ((0, 1, pair.first), (1, 0, pair.second)):
            if sure[mine] and not sure[other]:
                continue
            twin = (a, b)[other]
            evidence = {"twin": twin.id, "measure": pair.measure, "similarity": pair.similarity, "field": field}
            reason = f"a like message is answered differently in {field}"
            verdicts[index] = verdicts[index] or Verdict("label_consistency", reason, evidence)
    return verdicts


def differing(a: Row, left: dict, b: Row, right: dict) -> str | None:
    """The first field in which two answers differ without each having copied it from its own message."""
    for field in dict.fromkeys([*left, *right]):
        x, y = left.get(field), right.get(field)
        if isinstance(x, dict) and isinstance(y, dict):
            inner = differing(a, x, b, y)
            if inner:
                return f"{field}.{inner}"
        elif x != y and not (_copied(x, a, b) or _copied(y, b, a)):
            return field
    return None


def duplicates(rows: list[Row], values: list[dict], pairs: list[Pair], start: int = 0) -> Verdicts:
    """Gate 5: of alike rows the first stays. Rows before `start` are only compared with, never refused. Near-miss rows
    (and marked contrasts) with another answer than their twin stay: the contrast is what they teach."""
    verdicts: Verdicts = [None] * len(rows)
    for pair in pairs:
        a, b = rows[pair.first], rows[pair.second]
        if verdicts[pair.first] or verdicts[pair.second] or pair.second < start:
            continue
        near_miss = "near_miss" in (a.meta.kind, b.meta.kind) and pair.measure != "exact"
        if _contrast(a, b) or (near_miss and values[pair.first] != values[pair.second]):
            continue
        words = {"exact": "the same message", "jaccard": "nearly the same message", "cosine": "the same meaning"}
        evidence = {"twin": a.id, "measure": pair.measure, "similarity": pair.similarity}
        verdicts[pair.second] = Verdict("duplicates", f"{words[pair.measure]} as {a.id}", evidence)
    return verdicts


def _contrast(a: Row, b: Row) -> bool:
    return a.meta.provenance.get("contrast_of") == b.id or b.meta.provenance.get("contrast_of") == a.id


def _copied(value, own: Row, other: Row) -> bool:
    """Whether a value stands in its own row's message and not in the other's."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return False
    needle = "".join(c for c in str(value).lower() if c.isalnum())
    mine, theirs = ("".join(c for c in text_of(row).lower() if c.isalnum()) for row in (own, other))
    return bool(needle) and needle in mine and needle not in theirs
