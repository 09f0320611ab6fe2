"""How texts are compared: normal form, word shingles and skeletons, and their hashes for many texts at once."""

import hashlib
import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from slm.rows import Row

_WORD = re.compile(r"\w+")
_P = np.uint64(0x9E3779B97F4A7C15)  # odd: multiplying by it permutes the 64-bit numbers


def text_of(row: Row) -> str:
    """What the user says in a row, all turns."""
    return "\n".join(m.content for m in row.messages if m.role == "user")


def words(text: str) -> list[str]:
    """Lower-case words without accents."""
    if text.isascii():
        return _WORD.findall(text.lower())
    plain = unicodedata.normalize("NFKD", text).lower()
    return _WORD.findall("".join(c for c in plain if not unicodedata.combining(c)))


def skeleton(found: list[str], names: frozenset[str] = frozenset()) -> str:
    """Words with numbers and `names` masked: equal skeletons betray a filled template."""
    return " ".join(_mask(word, names) for word in found)


def _mask(word: str, names: frozenset[str]) -> str:
    return "#" if any(c.isdigit() for c in word) else "@" if word in names else word


@lru_cache(200_000)
def hash64(text: str) -> int:
    """The same 64 bits for the same text in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "little")


@dataclass
class Sketch:
    """What is kept of n texts: hashes of the words and of the skeleton (uint64, n), and of the distinct 3-shingles of
    words (30 bits; those of text i are shingles[starts[i]:starts[i + 1]], in order)."""

    text: np.ndarray
    shape: np.ndarray
    shingles: np.ndarray
    starts: np.ndarray

    def matrix(self):
        """One sparse line of shingles per text."""
        from scipy.sparse import csr_matrix

        ones = np.ones(len(self.shingles), np.int8)
        return csr_matrix((ones, self.shingles.view(np.int32), self.starts), shape=(len(self.text), 2**30))


def sketch(found: list[list[str]], names: frozenset[str] = frozenset()) -> Sketch:
    """The sketch of texts given as words; a text of fewer than three words is one shingle."""
    found = [each or [""] for each in found]
    sizes = np.fromiter(map(len, found), np.int64, len(found))
    ends, total = np.cumsum(sizes), int(sizes.sum())
    begins = ends - sizes
    row, size = np.repeat(np.arange(len(found)), sizes), np.repeat(sizes, sizes)
    place = np.arange(total) - np.repeat(begins, sizes)
    number: dict[str, int] = {}  # of each distinct word
    code = np.fromiter((number.setdefault(w, len(number)) for each in found for w in each), np.int64, total)
    plain = np.fromiter(map(hash64, number), np.uint64, len(number))[code]
    masked = np.fromiter((hash64(_mask(w, names)) for w in number), np.uint64, len(number))[code]
    powers = np.cumprod(np.full(int(sizes.max(initial=1)), _P))[place]
    run = plain * _P
    for step in (1, 2):
        there = np.flatnonzero(place + step < size)
        run[there] = (run[there] + plain[there + step]) * (_P + np.uint64(2 * step))
    use = place <= np.maximum(size - 3, 0)
    keys = np.sort((row[use].astype(np.uint64) << np.uint64(30)) | (run[use] >> np.uint64(34)))
    keys = keys[np.concatenate((np.ones(min(1, len(keys)), bool), keys[1:] != keys[:-1]))]
    counts = np.bincount((keys >> np.uint64(30)).astype(np.int64), minlength=len(found))
    starts = np.concatenate(([0], np.cumsum(counts)))
    text, shape = (np.add.reduceat(values * powers, begins) if total else values for values in (plain, masked))
    return Sketch(text, shape, (keys & np.uint64(2**30 - 1)).astype(np.uint32), starts)


def band_shape(threshold: float, most: int = 200) -> tuple[int, int]:
    """(rows, bands) of MinHash LSH: the most selective with at most `most` hashes that finds 99 % of the pairs at the
    threshold; of a pair with similarity s it finds 1 - (1 - s^rows)^bands (Leskovec et al., Mining of Massive Datasets)."""
    best = (1, 1)
    for rows in range(1, 33):
        bands = 1 if threshold**rows >= 1 else int(np.ceil(np.log(0.01) / np.log1p(-(threshold**rows))))
        if rows * bands <= most:
            best = (rows, bands)
    return best


def band_keys(sketched: Sketch, threshold: float) -> np.ndarray:
    """The MinHash band keys (n x bands, uint32): texts with equal shingles share all, alike texts at least one."""
    rows, bands = band_shape(threshold)
    factors = np.random.default_rng(0).integers(0, 2**32, (bands, rows, 2), dtype=np.uint32)
    keys = np.zeros((len(sketched.text), bands), np.uint32)
    for band in range(bands if len(keys) else 0):
        key = np.zeros(len(keys), np.uint64)
        for factor, shift in factors[band]:
            values = sketched.shingles * (factor | np.uint32(1)) ^ shift
            key = (key + np.minimum.reduceat(values, sketched.starts[:-1])) * _P
        keys[:, band] = key >> np.uint64(32)
    return keys


def tfidf(texts: list[str]):
    """Unit vectors of word weights, one sparse line per text: their products are cosines."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(tokenizer=words, token_pattern=None, lowercase=False, sublinear_tf=True).fit_transform(texts)
