"""Which rows are alike, and the gates that judge a row by its neighbours: consistency (9), duplicates (5), templates (6)."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from slm.curate.read import Verdict
from slm.curate.text import _P, text_of, tfidf
from slm.rows import Row

WINDOW, CROWD = 8, 64  # in a bucket a row is compared with so many before it; in a crowd with the first one only
Edges = tuple[np.ndarray, np.ndarray, np.ndarray]  # first < second, similarity
NONE: Edges = (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
# What is known of a row: hashes of words, skeleton (0: none) and answer; `spared` is what a person accepted.
ROW = np.dtype([("text", "u8"), ("shape", "u8"), ("value", "u8"), ("tokens", "i4"), ("near_miss", "?"), ("trusted", "?"), ("spared", "?")])


@dataclass
class Table:
    """n rows in order (dtype ROW), their ids, which of them no gate has refused, whom some differ from on purpose
    (provenance.contrast_of), and the verdicts of gate 6 on single rows, which wait for the gates before it."""

    rows: np.ndarray
    ids: list[str | None]
    alive: np.ndarray
    contrast: dict[int, str] = field(default_factory=dict)
    late: dict[int, Verdict] = field(default_factory=dict)

    @cached_property
    def firsts(self) -> np.ndarray:
        """For each row the first with the same words and answer; what a person accepted stands for itself, and what
        is refused too."""
        own = np.where(self.rows["spared"] | ~self.alive, np.arange(1, len(self.rows) + 1), 0).astype(np.uint64)
        return _first((self.rows["text"] * _P ^ self.rows["value"]) * _P + own)

    @property
    def distinct(self) -> np.ndarray:
        """The rows that repeat no earlier row's words and answer: only these are compared."""
        return np.flatnonzero((self.firsts == np.arange(len(self.rows))) & self.alive)

    def contrasted(self, a: int, b: int) -> bool:
        """Whether one says that it differs from the other on purpose."""
        return bool(self.contrast) and (self.contrast.get(a) == self.ids[b] or self.contrast.get(b) == self.ids[a])


def _first(keys: np.ndarray) -> np.ndarray:
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return first[inverse]


def bucket_pairs(keys: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of rows with equal keys, fewer than 10 per row: each with the 8 before it, in buckets of over 64 with the
    first alone, so that a template filled a million times costs no more than other rows."""
    order = np.lexsort((rows, keys))
    keys, rows = keys[order], rows[order]
    new = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1]))) if len(keys) else np.zeros(0, int)
    sizes = np.diff(np.concatenate((new, [len(keys)])))
    many = np.repeat(sizes > 1, sizes)
    size, head, rows = np.repeat(sizes, sizes)[many], np.repeat(rows[new], sizes)[many], rows[many]
    far = (np.arange(len(keys)) - np.repeat(new, sizes))[many]
    left, right = [head[far > 0]], [rows[far > 0]]
    for step in range(1, WINDOW + 1):
        at = np.flatnonzero((far > step) & (size <= CROWD))
        left.append(rows[at - step])
        right.append(rows[at])
    return np.concatenate(left), np.concatenate(right)


def near_edges(bands, rows: np.ndarray, shingles, threshold: float) -> Edges:
    """Pairs of `rows` whose 3-shingles have a Jaccard similarity of at least `threshold`. `bands` gives (line numbers
    among the rows, their keys) band by band; `shingles` is a sparse line per row."""
    seen = np.zeros(0, np.int64)
    for lines, keys in bands:
        a, b = bucket_pairs(keys, lines)
        seen = np.union1d(seen, (a.astype(np.int64) << 32) | b)
    sizes, found = np.diff(shingles.indptr), [NONE]
    for begin in range(0, len(seen), 500_000):
        a, b = seen[begin : begin + 500_000] >> 32, seen[begin : begin + 500_000] & (2**32 - 1)
        shared = np.diff(shingles[a].multiply(shingles[b]).tocsr().indptr)
        jaccard = shared / (sizes[a] + sizes[b] - shared)
        alike = jaccard >= threshold
        found.append((rows[a[alike]], rows[b[alike]], jaccard[alike]))
    return tuple(map(np.concatenate, zip(*found, strict=True)))


def cosine_edges(texts: dict[int, str], of: np.ndarray, threshold: float, chunk: int = 2000) -> Edges:
    """Pairs of the rows `of` with a TF-IDF cosine of at least `threshold`; all texts (by row) weigh the words."""
    found = [NONE]
    if len(of) > 1 and any(text.strip() for text in texts.values()):
        matrix = tfidf(list(texts.values()))[np.searchsorted(list(texts), of)]
        for begin in range(0, len(of), chunk):
            end = min(begin + chunk, len(of))
            product = (matrix[begin:end] @ matrix[:end].T).tocoo()
            hits = (product.data >= threshold) & (product.col < product.row + begin)
            found.append(_earliest(of[product.col[hits]], of[product.row[hits] + begin], product.data[hits]))
    return tuple(map(np.concatenate, zip(*found, strict=True)))


def vector_edges(vectors: np.ndarray, of: np.ndarray, threshold: float, cells: int = 1024, chunk: int = 4096) -> Edges:
    """Pairs of unit vectors (lines `of`) with a cosine of at least `threshold`, sought among the vectors of one cell: an
    inverted file whose centres are rows at even distances, each vector standing in its three nearest cells."""
    centres = vectors[of[:: max(1, len(of) // cells)]].astype(np.float32)
    assigned = []
    for begin in range(0, len(of), chunk):
        product = vectors[of[begin : begin + chunk]].astype(np.float32) @ centres.T
        assigned.append(np.argpartition(-product, min(2, len(centres) - 1), axis=1)[:, :3].copy())  # a view would keep it all
    cell = np.concatenate(assigned) if assigned else np.zeros((0, 2), int)
    lines, keys = np.tile(of, cell.shape[1]), cell.T.ravel()
    order = np.lexsort((lines, keys))
    found = [NONE]
    for members in np.split(lines[order], np.flatnonzero(np.diff(keys[order])) + 1):
        for begin in range(0, len(members), chunk):
            # A cell of more than `chunk` vectors is compared slice by slice: the cost stays linear.
            part = members[begin : begin + chunk]
            own = vectors[part].astype(np.float32)
            product = own @ own.T
            b, a = np.nonzero(np.tril(product >= threshold, -1))
            found.append(_earliest(part[a], part[b], product[b, a]))
    return tuple(map(np.concatenate, zip(*found, strict=True)))


def _earliest(first: np.ndarray, second: np.ndarray, similarity: np.ndarray) -> Edges:
    """Of each second row's pairs the eight with the earliest first rows: of thousands alike not all pairs are needed."""
    order = np.lexsort((first, second))
    first, second, similarity = first[order], second[order], similarity[order]
    use = np.arange(len(second)) - np.searchsorted(second, second) < WINDOW
    return first[use], second[use], similarity[use]


def join(table: Table, near: Edges, semantic: Edges) -> list[tuple[int, int, str, float]]:
    """All pairs of distinct rows in the order of (second, first), each with the measure that found it first. Rows with
    the same words are paired with the first of them."""
    text, own = table.rows["text"], table.distinct
    heads = own[_first(text[own])]
    best = {(a, b): ("exact", 1.0) for a, b in zip(heads.tolist(), own.tolist(), strict=True) if a != b}
    for measure, (a, b, similarity) in (("jaccard", near), ("cosine", semantic)):
        other = text[a] != text[b]
        for first, second, value in zip(a[other].tolist(), b[other].tolist(), similarity[other].tolist(), strict=True):
            best.setdefault((first, second), (measure, round(value, 3)))
    return [(a, b, *best[a, b]) for a, b in sorted(best, key=lambda pair: (pair[1], pair[0]))]


def decide(table: Table, edges: list, contradiction: float, near: float, fetch: Callable) -> dict[int, Verdict]:
    """The verdicts of gates 9, 5 and 6, by row number: a function of the rows' order and their pairs alone, whoever
    found them. `fetch(n)` gives the row and the value of row n."""
    verdicts = contradictions(table, edges, contradiction, fetch)
    duplicates(table, [e for e in edges if e[2] != "jaccard" or e[3] >= near], verdicts)
    text, spared, seen = table.rows["text"], table.rows["spared"], {}
    for n, shape in enumerate(table.rows["shape"].tolist()):
        if n in verdicts or not table.alive[n]:
            continue
        if n in table.late:
            verdicts[n] = table.late[n]
        elif shape and (twin := seen.setdefault(shape, n)) != n and text[twin] != text[n] and not spared[n]:
            reason = "the same sentence with other numbers or names"
            verdicts[n] = Verdict("trivial", reason, {"twin": table.ids[twin], "skeleton": ""})
    return verdicts


def contradictions(table: Table, edges: list, threshold: float, fetch: Callable) -> dict[int, Verdict]:
    """Gate 9: alike messages with answers that differ, other than by what each copied from its own message. A trusted
    row (seed rows, human rows, and what a person accepted) wins over another; else both go, for neither can be
    believed. A contrast made on purpose says so: provenance.contrast_of names its twin."""
    verdicts: dict[int, Verdict] = {}
    value, sure = table.rows["value"], table.rows["trusted"] | table.rows["spared"]
    np.logical_or.at(sure, table.firsts, sure.copy())  # words and answer of a trusted row can be trusted
    for a, b, measure, similarity in edges:
        alike = similarity < threshold or value[a] == value[b] or (a in verdicts and b in verdicts)
        if alike or table.contrasted(a, b) or (name := differing(*fetch(a), *fetch(b))) is None:
            continue
        for mine, other in ((a, b), (b, a)):
            if not table.rows["spared"][mine] and (sure[other] or not sure[mine]):
                evidence = {"twin": table.ids[other], "measure": measure, "similarity": similarity, "field": name}
                reason = f"a like message is answered differently in {name}"
                verdicts.setdefault(mine, Verdict("label_consistency", reason, evidence))
    return verdicts


def duplicates(table: Table, edges: list, verdicts: dict[int, Verdict]) -> None:
    """Gate 5, into `verdicts`: of alike rows the first stays. Near-miss rows (and marked contrasts) with another answer
    than their twin stay: the contrast is what they teach. What repeats words and answer goes even if the first is gone."""
    words = {"exact": "the same message", "jaccard": "nearly the same message", "cosine": "the same meaning"}
    copies = np.flatnonzero(table.firsts != np.arange(len(table.rows))).tolist()
    value, near_miss, spared = (table.rows[name] for name in ("value", "near_miss", "spared"))
    for a, b, measure, similarity in [*((int(table.firsts[n]), n, "exact", 1.0) for n in copies), *edges]:
        if b in verdicts or spared[b] or (a in verdicts and table.firsts[b] != a) or table.contrasted(a, b):
            continue
        if measure == "exact" or value[a] == value[b] or not (near_miss[a] or near_miss[b]):
            evidence = {"twin": table.ids[a], "measure": measure, "similarity": similarity}
            verdicts[b] = Verdict("duplicates", f"{words[measure]} as {table.ids[a]}", evidence)


def differing(a: Row, left: dict, b: Row, right: dict) -> str | None:
    """The first field in which two answers differ without each having copied it from its own message."""
    for name in dict.fromkeys([*left, *right]):
        x, y = left.get(name), right.get(name)
        if isinstance(x, dict) and isinstance(y, dict):
            inner = differing(a, x, b, y)
            if inner:
                return f"{name}.{inner}"
        elif x != y and not (_copied(x, a, b) or _copied(y, b, a)):
            return name
    return None


def _copied(value, own: Row, other: Row) -> bool:
    """Whether a value stands in its own row's message and not in the other's."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return False
    needle = "".join(c for c in str(value).lower() if c.isalnum())
    mine, theirs = ("".join(c for c in text_of(row).lower() if c.isalnum()) for row in (own, other))
    return bool(needle) and needle in mine and needle not in theirs
