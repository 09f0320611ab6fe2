"""Gate 10: no row may be, contain or closely paraphrase a row of an evaluation set."""

from dataclasses import dataclass

import numpy as np

from slm.curate.read import Verdict
from slm.curate.text import Sketch, sketch, text_of, tfidf, words
from slm.errors import SlmError
from slm.registry import SETS
from slm.rows import Row, read_rows


def evaluation_rows(settings) -> dict[str, list[Row]]:
    """The rows of the four evaluation sets. Raises SlmError when one is missing: leakage cannot be ruled out then."""
    missing = [name for name in SETS if not settings.path(f"data/eval/{name}.jsonl").is_file()]
    if missing:
        raise SlmError(f"data/eval/{missing[0]}.jsonl: missing; write the evaluation sets first (02_baseline).")
    names = [*SETS, "production_holdout"] if settings.path("data/eval/production_holdout.jsonl").is_file() else SETS
    return {name: read_rows(settings.path(f"data/eval/{name}.jsonl")) for name in names}


@dataclass
class Known:
    """The evaluation rows, ready to be compared with: (set, id) of each, its text, and the index of its shingles."""

    places: list[tuple[str, str]]
    texts: list[str]
    exact: dict[int, int]
    vocabulary: np.ndarray
    index: object  # sparse, shingles x rows
    sizes: np.ndarray
    vectors: np.ndarray | None = None

    def verdict(self, hit: tuple[int, str, float]) -> Verdict:
        """The verdict for (number of the evaluation row, measure, similarity)."""
        name, twin = self.places[hit[0]]
        evidence = {"set": name, "twin": twin, "measure": hit[1], "similarity": round(float(hit[2]), 3)}
        return Verdict("evaluation_leakage", f"too like row {twin} of data/eval/{name}.jsonl", evidence)


def index_of(sets: dict[str, list[Row]], embed=None) -> Known:
    """The index of the evaluation sets; `embed` gives unit vectors for texts."""
    from scipy.sparse import csr_matrix

    rows = [(name, row) for name, members in sets.items() for row in members]
    texts = [text_of(row) for _, row in rows]
    made = sketch([words(text) for text in texts])
    vocabulary, columns = np.unique(made.shingles, return_inverse=True)
    matrix = csr_matrix((np.ones(len(columns), np.int32), columns, made.starts), shape=(len(texts), len(vocabulary)))
    exact = {int(h): n for n, h in enumerate(made.text)}
    vectors = embed(texts) if embed and texts else None
    places = [(name, row.id) for name, row in rows]
    return Known(places, texts, exact, vocabulary, matrix.T.tocsr(), np.diff(made.starts), vectors)


def overlaps(made: Sketch, known: Known, near: float) -> list[tuple[int, str, float] | None]:
    """For each text the evaluation row that it repeats. Exact: the same words. Near: Jaccard of word 3-shingles at least
    `near`. Contained: an evaluation message of ten words or more stands in it (90 % of its shingles)."""
    from scipy.sparse import csr_matrix

    hits: list = [None] * len(made.text)
    if not known.texts:
        return hits
    column = np.minimum(np.searchsorted(known.vocabulary, made.shingles), len(known.vocabulary) - 1)
    there = known.vocabulary[column] == made.shingles
    starts = np.concatenate(([0], np.cumsum(there)))[made.starts]
    ones = np.ones(starts[-1], np.int32)
    shared = (csr_matrix((ones, column[there], starts), shape=(len(hits), len(known.vocabulary))) @ known.index).tocoo()
    size = known.sizes[shared.col]
    jaccard = shared.data / (np.diff(made.starts)[shared.row] + size - shared.data)
    contained = np.where(size >= 8, shared.data / size, 0)
    score = np.where(jaccard >= near, jaccard, np.where(contained >= 0.9, contained, 0))
    for n in sorted(np.flatnonzero(score).tolist(), key=lambda n: (score[n], -shared.col[n])):
        hits[shared.row[n]] = (int(shared.col[n]), "jaccard" if jaccard[n] >= near else "contained", score[n])
    for n, h in enumerate(made.text.tolist()):
        if h in known.exact:
            hits[n] = (known.exact[h], "exact", 1.0)
    return hits


def nearest(vectors: np.ndarray, known: np.ndarray) -> list[tuple[int, float]]:
    """For each unit vector the nearest of the known ones, and the cosine."""
    product = vectors @ known.T
    return list(zip(product.argmax(axis=1).tolist(), product.max(axis=1).tolist(), strict=True))


def paraphrases(texts: list[str], known: Known, chunk: int = 5000) -> list[tuple[int, float]]:
    """For each text the nearest evaluation text and its TF-IDF cosine, the weights taken from all of them."""
    if not texts or not any(words(text) for text in known.texts):
        return [(0, 0.0)] * len(texts)
    matrix, found = tfidf([*known.texts, *texts]), []
    for begin in range(len(known.texts), matrix.shape[0], chunk):
        product = (matrix[begin : begin + chunk] @ matrix[: len(known.texts)].T).toarray()
        found += zip(product.argmax(axis=1).tolist(), product.max(axis=1).tolist(), strict=True)
    return found


def leaks(rows: list[Row], sets: dict[str, list[Row]], near: float, semantic: float) -> list[Verdict | None]:
    """The whole gate over rows in memory: exact, near and contained, and TF-IDF cosine of at least `semantic`."""
    known, texts = index_of(sets), [text_of(row) for row in rows]
    hits = overlaps(sketch([words(text) for text in texts]), known, near)
    close = paraphrases(texts, known)
    hits = [hit or ((n, "cosine", cosine) if cosine >= semantic else None) for hit, (n, cosine) in zip(hits, close, strict=True)]
    return [hit and known.verdict(hit) for hit in hits]
