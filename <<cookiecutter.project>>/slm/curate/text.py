"""How texts are compared: normal form, word shingles, skeleton, and which pairs of many texts are alike."""

import re
import unicodedata
from dataclasses import dataclass

from slm.rows import Row

_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Pair:
    """Texts number `first` < `second` are alike by `measure` ("exact", "jaccard" or "cosine")."""

    first: int
    second: int
    measure: str
    similarity: float


def text_of(row: Row) -> str:
    """What the user says in a row, all turns."""
    return "\n".join(m.content for m in row.messages if m.role == "user")


def words(text: str) -> list[str]:
    """Lower-case words without accents."""
    plain = unicodedata.normalize("NFKD", text).lower()
    return _WORD.findall("".join(c for c in plain if not unicodedata.combining(c)))


def shingles(text: str, n: int = 3) -> frozenset[str]:
    """The runs of `n` words of a text; a shorter text is one run."""
    found = words(text)
    return frozenset(" ".join(found[i : i + n]) for i in range(max(1, len(found) - n + 1)))


def skeleton(text: str, names: frozenset[str] = frozenset()) -> str:
    """The text with numbers and `names` masked: equal skeletons betray a filled template."""
    return " ".join("#" if any(c.isdigit() for c in w) else "@" if w in names else w for w in words(text))


def pairs_of(rows: list[Row], jaccard_at: float, cosine_at: float, start: int = 0) -> list[Pair]:
    """Pairs of rows whose messages are alike; of the rows before `start`, none is compared with another. Exact: the
    same words. Near: MinHash LSH over word 3-shingles, each hit verified by the exact Jaccard similarity. Semantic:
    TF-IDF cosine. A pair is reported once, by the first of these measures that finds it."""
    texts = [text_of(row) for row in rows]
    best: dict[tuple[int, int], Pair] = {}
    sets = [shingles(text) for text in texts]
    for pair in (*_exact(texts, start), *_near(sets, jaccard_at, start), *_cosine(texts, cosine_at, start)):
        best.setdefault((pair.first, pair.second), pair)
    return [best[key] for key in sorted(best, key=lambda k: (k[1], k[0]))]


def _exact(texts: list[str], start: int) -> list[Pair]:
    first, pairs = {}, []
    for j, text in enumerate(texts):
        i = first.setdefault(" ".join(words(text)), j)
        if i < j and j >= start:
            pairs.append(Pair(i, j, "exact", 1.0))
    return pairs


def _near(sets: list[frozenset], threshold: float, start: int) -> list[Pair]:
    from datasketch import MinHash, MinHashLSH

    # LSH is blurred around its threshold: look below it, then keep what truly reaches it.
    index = MinHashLSH(threshold=max(0.2, 0.75 * threshold), num_perm=128)
    pairs = []
    encoded = ([shingle.encode() for shingle in shingle_set] for shingle_set in sets)
    for j, signature in enumerate(MinHash.generator(encoded, num_perm=128)):
        if j >= start:
            for i in index.query(signature):
                similarity = len(sets[i] & sets[j]) / len(sets[i] | sets[j])
                if similarity >= threshold:
                    pairs.append(Pair(i, j, "jaccard", round(similarity, 3)))
        index.insert(j, signature, check_duplication=False)
    return pairs


def tfidf(texts: list[str]):
    """Unit vectors of word weights, one sparse line per text: their products are cosines."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(tokenizer=words, token_pattern=None, lowercase=False, sublinear_tf=True).fit_transform(texts)


def _cosine(texts: list[str], threshold: float, start: int, chunk: int = 2000) -> list[Pair]:
    if len(texts) < 2 or not any(words(text) for text in texts):
        return []
    matrix, pairs = tfidf(texts), []
    for begin in range(start, len(texts), chunk):
        end = min(begin + chunk, len(texts))
        product = (matrix[begin:end] @ matrix[:end].T).tocoo()
        hits = product.data >= threshold
        for row, i, value in zip(product.row[hits], product.col[hits], product.data[hits], strict=True):
            if i < begin + row:
                pairs.append(Pair(int(i), int(begin + row), "cosine", round(float(value), 3)))
    return pairs
