"""What the messages are about, by k-means over their embeddings: a look at diversity, and groups for the split."""

from collections import defaultdict
from pathlib import Path

from slm.curate.engine import embed
from slm.curate.text import text_of, tfidf, words
from slm.rows import Row, iter_rows

MOST_TEXTS = 50_000  # a table over more texts than this is made from an even sample of them


def cluster_ids(texts: list[str], settings) -> list[int]:
    """The cluster of each text, from 0 in order of appearance: as many as the square root of the texts, 10 to 200."""
    return _clusters(texts, settings)[0]


def cluster_table(rows: list[Row] | Path, settings):
    """A table of the clusters of `rows` (or of the file that holds them), the largest first: rows, share, the two texts
    nearest to the centre, and a warning where one holds more than `curate.cluster_share` of the rows."""
    import pandas as pd

    texts = [text_of(row) for row in (iter_rows(rows) if isinstance(rows, Path) else rows)]
    texts = texts[:: 1 + len(texts) // MOST_TEXTS]
    ids, apart = _clusters(texts, settings)
    members: dict[int, list[str]] = defaultdict(list)
    for place in sorted(range(len(texts)), key=apart.__getitem__):
        members[ids[place]].append(texts[place][:48])
    lines = []
    for cluster, inside in sorted(members.items(), key=lambda item: -len(item[1])):
        share = len(inside) / len(texts)
        warning = f"one cluster holds {share:.0%} of the rows" if share > settings.curate.cluster_share else ""
        lines.append((cluster, len(inside), round(share, 3), *(inside + [""])[:2], warning))
    return pd.DataFrame(lines, columns=["cluster", "rows", "share", "nearest", "next", "warning"])


def _clusters(texts: list[str], settings) -> tuple[list[int], list[float]]:
    """Cluster ids, and the squared distance of each text to its cluster's centre, over unit vectors."""
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.decomposition import TruncatedSVD
    from sklearn.preprocessing import normalize

    cfg = settings.curate
    k = min(200, max(10, round(len(texts) ** 0.5)), len({" ".join(words(text)) for text in texts}))
    if k < 2:
        return [0] * len(texts), [0.0] * len(texts)
    if cfg.embedder:
        vectors = embed(cfg.embedder, texts)
    else:
        vectors = tfidf(texts)
        size = min(64, *(n - 1 for n in vectors.shape))
        vectors = TruncatedSVD(size, random_state=cfg.seed).fit_transform(vectors) if size > 1 else vectors.toarray()
    vectors = normalize(vectors)
    model = MiniBatchKMeans(k, random_state=cfg.seed, n_init=3, batch_size=4096).fit(vectors)
    order = {old: new for new, old in enumerate(dict.fromkeys(model.labels_.tolist()))}
    apart = ((vectors - model.cluster_centers_[model.labels_]) ** 2).sum(axis=1)
    return [order[label] for label in model.labels_.tolist()], apart.tolist()
