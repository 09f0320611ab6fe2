"""How far requests lie from the rows that a model was made with: in length, language, topic and categories.

Every distance is between 0 (the same) and 1 (nothing in common)."""

import random
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from slm import registry
from slm.contract import Contract
from slm.curate.text import words
from slm.curate.versions import split_of
from slm.production.logs import LogLine
from slm.production.scrub import PLACEHOLDER, language, scrub
from slm.repair.clusters import vectors
from slm.rows import read_rows

MOST = 2000  # texts of each side that are compared, drawn by a fixed seed
KINDS = ("length", "language", "topic", "categories")
FEW = 50  # below this many on one side nothing is said
ALPHA = 0.01  # a difference is no chance below this p-value; with many requests that alone means little
FAR = 0.01  # a request is far from the reference when at most this share of the reference lies as far from the rest


@dataclass(frozen=True)
class Texts:
    """What is compared of texts: without what the scrub finds, on both sides; labels where an answer has one."""

    name: str
    texts: list[str]
    languages: list[str]
    labels: list[str]


def texts_of(name: str, contract: Contract, said: Sequence[tuple[str, str]]) -> Texts:
    """At most MOST of the (text, answer) pairs, ready to be compared."""
    said = random.Random(0).sample(said, MOST) if len(said) > MOST else said
    texts = [_clean(text) for text, _ in said]
    labels = (contract.label(contract.parse(answer).value) for _, answer in said)
    return Texts(name, texts, [language(text) for text in texts], [label for label in labels if label])


def reference(settings, contract: Contract) -> Texts | None:
    """The training rows of the last release, where they are kept; else those in data/accepted; before there are any,
    the rows of dev; None without these."""
    version = (registry.latest(settings, "runs", stage="release") or {}).get("dataset_version")
    accepted, dev = settings.path("data/accepted/train.jsonl"), settings.path("data/eval/dev.jsonl")
    if version and settings.path(f"registry/datasets/{version}.jsonl.gz").is_file():
        own = settings.model_copy(update={"train": settings.train.model_copy(update={"dataset": version})})
        name, rows = f"training rows of dataset {version}", read_rows(split_of(own, "train"))
    else:
        name, file = ("training rows in data/accepted", accepted) if accepted.is_file() else ("rows of dev", dev)
        rows = read_rows(file) if file.is_file() else []
    return texts_of(name, contract, [(row.user, row.answer) for row in rows]) if rows else None


def of_lines(name: str, contract: Contract, lines: Sequence[LogLine]) -> Texts:
    """The requests of a log, as the reference's counterpart."""
    return texts_of(name, contract, [(line.input, line.output) for line in lines])


def distances(settings, known: Texts, new: Texts) -> dict[str, dict]:
    """{"length", "language", "topic", "categories"}: value, p, n (of the smaller side), and what moved. Length: the
    Kolmogorov-Smirnov distance. Language, categories: total variation, with Pearson's chi-square test. Topic: a
    classifier two-sample test (Lopez-Paz & Oquab 2017) on TF-IDF or `curate.embedder`, within the reference's commonest
    language; 2 x accuracy - 1 is at most the total variation. Left out: what fewer than FEW on one side say."""
    from scipy.stats import ks_2samp

    n, found = min(len(known.texts), len(new.texts)), {}
    if n >= FEW:
        before, after = (sorted(map(len, side.texts)) for side in (known, new))
        test, moved = ks_2samp(before, after), f"median {before[len(before) // 2]} to {after[len(after) // 2]} characters"
        found["length"] = _line(test.statistic, test.pvalue, n, moved)
        found["language"] = _shares(known.languages, new.languages)
    if topic := _topic(known, new, settings.curate.embedder):
        found["topic"] = topic
    if min(len(known.labels), len(new.labels)) >= FEW:
        found["categories"] = _shares(known.labels, new.labels)
    return found


def drift_table(settings, contract: Contract, lines: Sequence[LogLine]) -> list[dict]:
    """A log's requests against the reference, a line for each kind of distance; too few have no value."""
    known = reference(settings, contract)
    found = distances(settings, known, of_lines("", contract, lines)) if known else {}
    none = {"value": None, "p": None, "n": len(lines), "moved": f"fewer than {FEW} on a side"}
    return [{"distance": name, **found.get(name, none), "from the": known.name if known else "(nothing to compare with)"} for name in KINDS]


def unlike(settings, known: Texts, lines: Sequence[LogLine]) -> list[tuple[float, str]]:
    """For each request how unusual it is beside the reference, and in what: the share of the reference that is at least
    as far out, in length, in its language, or from its nearest text (a conformal p-value, Bates et al. 2023)."""
    import numpy as np

    texts = [_clean(line.input) for line in lines]
    if not any(map(words, texts)) or not any(map(words, known.texts)):
        return [(1.0, "")] * len(lines)
    n, spoken, sizes = len(known.texts), Counter(known.languages), sorted(map(len, known.texts))
    made = vectors([*known.texts, *texts], settings.curate.embedder)

    def nearest(begin: int, end: int):
        product = made[begin:end] @ made[:n].T
        return product if settings.curate.embedder else product.toarray()

    own = nearest(0, n)
    np.fill_diagonal(own, -1)
    apart, found = sorted(own.max(axis=1)), []
    for begin in range(n, n + len(texts), MOST):
        for text, close in zip(texts[begin - n :], nearest(begin, begin + MOST).max(axis=1), strict=False):
            tail = min(bisect_right(sizes, len(text)), n - bisect_left(sizes, len(text)))
            counts = {"length": 2 * tail, "language": spoken[language(text)], "topic": bisect_right(apart, close)}
            what = min(counts, key=lambda name: counts[name])
            found.append((min(1.0, (1 + counts[what]) / (n + 1)), what))
    return found


def _clean(text: str) -> str:
    return PLACEHOLDER.sub("", scrub(text)[0][0])


def _line(value: float, p: float, n: int, moved: str = "") -> dict:
    return {"value": float(value), "p": float(p), "n": int(n), "moved": moved}


def _shares(known: list[str], new: list[str]) -> dict:
    from scipy.stats import chi2_contingency

    before = Counter(known)
    after = Counter(one if one in before else "(new)" for one in new)  # a name from a log may be anybody's
    names = sorted({*before, *after})
    table = [[side[name] for name in names] for side in (before, after)]
    gaps = {name: after[name] / len(new) - before[name] / len(known) for name in names}
    most = max(names, key=lambda name: abs(gaps[name]))
    moved = f"{most or 'unknown'} {before[most] / len(known):.0%} to {after[most] / len(new):.0%}"
    p = chi2_contingency(table).pvalue if len(names) > 1 else 1.0
    return _line(sum(map(abs, gaps.values())) / 2, p, min(len(known), len(new)), moved)


def _topic(known: Texts, new: Texts, embedder: str) -> dict | None:
    from scipy.stats import binomtest
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.naive_bayes import MultinomialNB

    main = Counter(known.languages).most_common(1)[0][0]
    sides = [[t for t, code in zip(s.texts, s.languages, strict=True) if code == main and words(t)] for s in (known, new)]
    n = min(MOST // 2, *map(len, sides))
    if n < FEW:
        return None
    texts = [text for side in sides for text in random.Random(0).sample(side, n)]
    truth = [0] * n + [1] * n
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    # Naive Bayes weighs word by word and so does not see length, as a logistic regression on word weights would.
    model = LogisticRegression(max_iter=1000) if embedder else MultinomialNB()
    said = cross_val_predict(model, vectors(texts, embedder), truth, cv=folds)
    right = int((said == truth).sum())
    return _line(max(0.0, right / n - 1), binomtest(right, 2 * n, 0.5, "greater").pvalue, n)
