"""Gate 10: no row may be, contain or closely paraphrase a row of an evaluation set."""

from collections import Counter, defaultdict

from slm.curate.read import Verdict
from slm.curate.text import shingles, text_of, tfidf, words
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


def leaks(rows: list[Row], sets: dict[str, list[Row]], near: float, semantic: float) -> list[Verdict | None]:
    """Exact: the same words. Near: Jaccard of word 3-shingles at least `near`. Contained: an evaluation message of ten
    words or more stands in the row (90 % of its shingles). Semantic: TF-IDF cosine at least `semantic`."""
    known = [(name, row) for name, members in sets.items() for row in members]
    texts = [text_of(row) for _, row in known]
    shingled = [shingles(text) for text in texts]
    exact = {" ".join(words(text)): n for n, text in enumerate(texts)}
    index = defaultdict(list)
    for n, found in enumerate(shingled):
        for shingle in found:
            index[shingle].append(n)
    close = _cosine([text_of(row) for row in rows], texts)
    verdicts: list[Verdict | None] = [None] * len(rows)
    for place, (row, (best, cosine)) in enumerate(zip(rows, close, strict=True)):
        hit, measure, similarity = exact.get(" ".join(words(text_of(row)))), "exact", 1.0
        if hit is None:
            hit, measure, similarity = _overlap(shingles(text_of(row)), index, shingled, near)
        if hit is None and cosine >= semantic:
            hit, measure, similarity = best, "cosine", cosine
        if hit is None:
            continue
        name, twin = known[hit]
        evidence = {"set": name, "twin": twin.id, "measure": measure, "similarity": round(similarity, 3)}
        reason = f"too like row {twin.id} of data/eval/{name}.jsonl"
        verdicts[place] = Verdict("evaluation_leakage", reason, evidence)
    return verdicts


def _overlap(own: frozenset, index: dict, shingled: list[frozenset], near: float):
    shared = Counter(n for shingle in own for n in index.get(shingle, ()))
    best = (None, "", 0.0)
    for n, count in shared.items():
        jaccard = count / (len(own) + len(shingled[n]) - count)
        contained = count / len(shingled[n]) if len(shingled[n]) >= 8 else 0.0
        if jaccard >= near and jaccard > best[2]:
            best = (n, "jaccard", jaccard)
        elif contained >= 0.9 and contained > best[2]:
            best = (n, "contained", contained)
    return best


def _cosine(texts: list[str], known: list[str], chunk: int = 5000) -> list[tuple[int, float]]:
    """For each text the nearest known text and its TF-IDF cosine."""
    if not texts or not any(words(text) for text in known):
        return [(0, 0.0)] * len(texts)
    matrix, found = tfidf([*known, *texts]), []
    for begin in range(len(known), matrix.shape[0], chunk):
        product = (matrix[begin : begin + chunk] @ matrix[: len(known)].T).toarray()
        found += zip(product.argmax(axis=1).tolist(), product.max(axis=1).tolist(), strict=True)
    return found
