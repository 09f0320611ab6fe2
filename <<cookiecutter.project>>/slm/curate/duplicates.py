"""Which rows are alike, and the gates that judge a row by its neighbours: consistency (9), duplicates (5), templates (6)."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from slm.curate.read import Verdict
from slm.curate.text import text_of, tfidf
from slm.rows import Row

WINDOW, CROWD = 8, 64  # in a bucket a row is compared with so many before it; in a crowd with the first one only
Edges = tuple[np.ndarray, np.ndarray, np.ndarray]  # first < second, similarity


@dataclass
class Table:
    """What is known of n rows in order, as arrays: their places in the run, hashes of words, skeleton (0: none) and
    answer, and who they are. `late` are the verdicts of gate 6 on single rows."""

    place: np.ndarray
    text: np.ndarray
    shape: np.ndarray
    value: np.ndarray
    near_miss: np.ndarray
    trusted: np.ndarray
    exempt: np.ndarray  # accepted by a person
    ids: list[str]
    contrast: dict[int, str] = field(default_factory=dict)
    late: dict[int, Verdict] = field(default_factory=dict)

    def first_of(self, *keys: np.ndarray) -> np.ndarray:
        """For each row the first with equal keys."""
        mixed = keys[0].copy()
        for key in keys[1:]:
            mixed = mixed * np.uint64(0x9E3779B97F4A7C15) ^ key
        _, first, inverse = np.unique(mixed, return_index=True, return_inverse=True)
        return first[inverse]

    def contrasted(self, a: int, b: int) -> bool:
        """Whether one says that it differs from the other on purpose (provenance.contrast_of)."""
        return bool(self.contrast) and (self.contrast.get(a) == self.ids[b] or self.contrast.get(b) == self.ids[a])


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
    first, second, similar = [], [], []
    sizes = np.diff(shingles.indptr)
    for begin in range(0, len(seen), 500_000):
        a, b = seen[begin : begin + 500_000] >> 32, seen[begin : begin + 500_000] & (2**32 - 1)
        shared = np.diff(shingles[a].multiply(shingles[b]).tocsr().indptr)
        jaccard = shared / (sizes[a] + sizes[b] - shared)
        alike = jaccard >= threshold
        for found, values in ((first, rows[a]), (second, rows[b]), (similar, jaccard)):
            found.append(values[alike])
    empty = [np.zeros(0, np.int64)]
    return tuple(np.concatenate(found or empty) for found in (first, second, similar))


def cosine_edges(texts: list[str], of: np.ndarray, threshold: float, chunk: int = 2000) -> Edges:
    """Pairs of the texts numbered `of` with a TF-IDF cosine of at least `threshold`; all texts weigh the words."""
    found = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))]
    if len(of) > 1 and any(text.strip() for text in texts):
        matrix = tfidf(texts)[of]
        for begin in range(0, len(of), chunk):
            end = min(begin + chunk, len(of))
            product = (matrix[begin:end] @ matrix[:end].T).tocoo()
            hits = (product.data >= threshold) & (product.col < product.row + begin)
            found.append(_earliest(of[product.col[hits]], of[product.row[hits] + begin], product.data[hits]))
    return tuple(map(np.concatenate, zip(*found, strict=True)))


def vector_edges(vectors: np.ndarray, of: np.ndarray, threshold: float, cells: int = 1024, chunk: int = 4096) -> Edges:
    """Pairs of unit vectors (lines `of`) with a cosine of at least `threshold`, sought among the vectors of one cell: an
    inverted file whose centres are rows at even distances, each vector standing in its two nearest cells."""
    centres = vectors[of[:: max(1, len(of) // cells)]].astype(np.float32)
    assigned = []
    for begin in range(0, len(of), chunk):
        product = vectors[of[begin : begin + chunk]].astype(np.float32) @ centres.T
        assigned.append(np.argpartition(-product, min(1, len(centres) - 1), axis=1)[:, :2])
    cell = np.concatenate(assigned) if assigned else np.zeros((0, 2), int)
    lines, keys = np.tile(of, cell.shape[1]), cell.T.ravel()
    order = np.lexsort((lines, keys))
    found = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))]
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
    """All pairs in the order of (second, first), each with the measure that found it first. Rows with the same words
    are paired with the first of them."""
    heads = table.first_of(table.text)
    own = np.flatnonzero((heads != np.arange(len(heads))) & (table.first_of(table.text, table.value) == np.arange(len(heads))))
    best = {(int(heads[n]), int(n)): ("exact", 1.0) for n in own}
    for measure, (a, b, similarity) in (("jaccard", near), ("cosine", semantic)):
        other = table.text[a] != table.text[b]
        for first, second, value in zip(a[other].tolist(), b[other].tolist(), similarity[other].tolist(), strict=True):
            best.setdefault((first, second), (measure, round(value, 3)))
    return [(a, b, *best[a, b]) for a, b in sorted(best, key=lambda pair: (pair[1], pair[0]))]


def decide(table: Table, edges: list, contradiction: float, near: float, fetch: Callable) -> dict[int, Verdict]:
    """The verdicts of gates 9, 5 and 6, by row number: a function of the rows' order and their pairs alone, whoever
    found them. `fetch(n)` gives the row and the value of row n."""
    firsts = table.first_of(table.text, table.value)
    copies = defaultdict(list)  # of each first row with these words and this answer, the others
    for n in np.flatnonzero(firsts != np.arange(len(firsts))).tolist():
        copies[int(firsts[n])].append(n)
    verdicts = contradictions(table, edges, contradiction, copies, fetch)
    duplicates(table, edges, near, firsts, verdicts)
    seen: dict[int, int] = {}
    for n, shape in enumerate(table.shape.tolist()):
        if n in verdicts:
            continue
        if n in table.late:
            verdicts[n] = table.late[n]
        elif shape and (twin := seen.setdefault(shape, n)) != n and table.text[twin] != table.text[n] and not table.exempt[n]:
            reason = "the same sentence with other numbers or names"
            verdicts[n] = Verdict("trivial", reason, {"twin": table.ids[twin], "skeleton": ""})
    return verdicts


def contradictions(table: Table, edges: list, threshold: float, copies: dict, fetch: Callable) -> dict[int, Verdict]:
    """Gate 9: alike messages with answers that differ, other than by what each copied from its own message. A trusted
    row (seed rows, human rows) wins over another; else both go, for neither can be believed."""
    verdicts: dict[int, Verdict] = {}
    sure = {n for n in np.flatnonzero(table.trusted).tolist()}
    settled = set()
    for a, b, measure, similarity in edges:
        alike = similarity < threshold or table.value[a] == table.value[b] or (a in settled and b in settled)
        if alike or table.contrasted(a, b) or (name := differing(*fetch(a), *fetch(b))) is None:
            continue
        for mine, other in ((a, b), (b, a)):
            beaten = any(n in sure for n in (other, *copies.get(other, ())))
            evidence = {"twin": table.ids[other], "measure": measure, "similarity": similarity, "field": name}
            for n in (mine, *copies.get(mine, ())) if mine not in settled else ():
                if not table.exempt[n] and (beaten or n not in sure):
                    reason = f"a like message is answered differently in {name}"
                    verdicts.setdefault(n, Verdict("label_consistency", reason, evidence))
            if beaten or not any(n in sure for n in (mine, *copies.get(mine, ()))):
                settled.add(mine)
    return verdicts


def duplicates(table: Table, edges: list, near: float, firsts: np.ndarray, verdicts: dict[int, Verdict]) -> None:
    """Gate 5, into `verdicts`: of alike rows the first stays. Near-miss rows (and marked contrasts) with another answer
    than their twin stay: the contrast is what they teach."""
    words = {"exact": "the same message", "jaccard": "nearly the same message", "cosine": "the same meaning"}
    before = defaultdict(list)
    for a, b, measure, similarity in edges:
        if measure != "jaccard" or similarity >= near:
            before[b].append((a, measure, similarity))
    kept: dict[int, int] = {}  # of rows with the same words and answer, the one that stays
    for n in sorted({*before, *np.flatnonzero(firsts != np.arange(len(firsts))).tolist()}):
        first = int(firsts[n])
        if n in verdicts or table.exempt[n]:
            continue
        if first != n and first in verdicts and verdicts[first].gate == "duplicates":
            verdicts[n] = verdicts[first]
            continue
        around = before[n]
        if first != n:
            leader = kept.setdefault(first, first if first not in verdicts else n)
            around = [(leader, "exact", 1.0)] if leader != n else []
        for twin, measure, similarity in around:
            spared = measure != "exact" and (table.near_miss[n] or table.near_miss[twin]) and table.value[n] != table.value[twin]
            if twin in verdicts or spared or table.contrasted(twin, n):
                continue
            evidence = {"twin": table.ids[twin], "measure": measure, "similarity": similarity}
            verdicts[n] = Verdict("duplicates", f"{words[measure]} as {table.ids[twin]}", evidence)
            break


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
