"""What the messages are about, by k-means over their embeddings: a look at diversity, and groups for the split."""

from collections import defaultdict
from pathlib import Path

from slm.curate.text import text_of, tfidf, words
from slm.errors import SlmError
from slm.rows import Row, iter_rows

MOST_TEXTS = 50_000  # a table over more texts than this is made from an even sample of them


def embed(texts: list[str], settings):
    """Unit vectors, one line per text: `curate.embedder` (model2vec), else TF-IDF reduced to 64 dimensions (SVD)."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.preprocessing import normalize

    if settings.curate.embedder:
        try:
            from model2vec import StaticModel
        except ImportError:
            raise SlmError("curate.embedder: model2vec is not installed; `pip install model2vec`, or leave it empty.") from None
        return normalize(StaticModel.from_pretrained(settings.curate.embedder).encode(texts))
    matrix = tfidf(texts)
    size = min(64, *(n - 1 for n in matrix.shape))
    vectors = TruncatedSVD(size, random_state=settings.curate.seed).fit_transform(matrix) if size > 1 else matrix.toarray()
    return normalize(vectors)


def cluster_ids(texts: list[str], settings, k: int = 0) -> list[int]:
    """The cluster of each text, from 0. `k` clusters at most; 0: the square root of the texts, from 10 to 200."""
    return _clusters(texts, settings, k)[0]


def _clusters(texts: list[str], settings, k: int) -> tuple[list[int], list[float]]:
    """Cluster ids, and the distance of each text to its cluster's centre."""
    from sklearn.cluster import MiniBatchKMeans

    k = min(k or min(200, max(10, round(len(texts) ** 0.5))), len({" ".join(words(text)) for text in texts}))
    if k < 2:
        return [0] * len(texts), [0.0] * len(texts)
    vectors = embed(texts, settings)
    model = MiniBatchKMeans(k, random_state=settings.curate.seed, n_init=3, batch_size=4096).fit(vectors)
    ids = {old: new for new, old in enumerate(dict.fromkeys(model.labels_.tolist()))}  # numbered as they appear
    apart = ((vectors - model.cluster_centers_[model.labels_]) ** 2).sum(axis=1)
    return [ids[label] for label in model.labels_.tolist()], apart.tolist()


def cluster_table(rows: list[Row] | Path, settings):
    """A table of the clusters, the largest first: rows, share, the two texts nearest to the centre, a warning where one
    holds more than `curate.cluster_share` of the rows. `rows`: rows, or the file that holds them."""
    import pandas as pd

    texts = [text_of(row) for row in (iter_rows(rows) if isinstance(rows, Path) else rows)]
    texts = texts[:: 1 + len(texts) // MOST_TEXTS]
    ids, apart = _clusters(texts, settings, 0)
    members: dict[int, list[str]] = defaultdict(list)
    for place in sorted(range(len(texts)), key=apart.__getitem__):
        members[ids[place]].append(texts[place][:48])
    lines = []
    for cluster, inside in sorted(members.items(), key=lambda item: -len(item[1])):
        share = len(inside) / len(texts)
        warning = f"one cluster holds {share:.0%} of the rows" if share > settings.curate.cluster_share else ""
        lines.append((cluster, len(inside), round(share, 3), *(inside + [""])[:2], warning))
    return pd.DataFrame(lines, columns=["cluster", "rows", "share", "nearest", "next", "warning"])
