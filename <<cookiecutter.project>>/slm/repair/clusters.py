"""Failures that the same rows would mend: the user's own patterns first, then cause, label or field, and topic."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

from slm.curate.engine import embed
from slm.curate.text import text_of, tfidf, words
from slm.repair.causes import CAUSES, Finding
from slm.rows import Difficulty, Kind, Row

SPLIT = 10  # failures from which on a group is searched for topics
MISSING = "missing category"  # one gap of the data, whatever the messages are about
BY_LABEL = ("wrong label", "tool name wrong")  # causes of which each label that was missed is a cluster of its own
APART = 0.05  # least silhouette of a split; a random one has about 0


@dataclass(frozen=True)
class Pattern:
    """A cluster of the user's own (task/clusters.py). `match(row, score)` says whether a failed row belongs to it;
    `situation` tells the teacher what the rows must show."""

    name: str
    match: Callable[[Row, object], bool]
    situation: str


class Cell(BaseModel):
    """Rows that show one situation; category, kind and difficulty are those of the failures where it does not say."""

    situation: str = Field(min_length=1, max_length=400)
    category: str = ""
    kind: Kind | None = None
    difficulty: Difficulty | None = None
    rows: int = 0
    prompt: str = ""


class Cluster(BaseModel):
    """Failures of one kind, and the situations that new rows must show. `about` are words that set its messages apart,
    for a reader only; `twins` the likest training rows; `contradictions` those that teach what the model wrongly said
    (row, train, cosine, field, taught); `by` names the judge that made it."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    cause: str
    label: str = ""
    got: str = ""
    about: str = ""
    blame: str = "data"
    root_cause: str = ""
    situations: list[Cell] = []
    findings: list[Finding]
    twins: list[str] = []
    contradictions: list[dict] = []
    by: str = "rules"

    @property
    def check_first(self) -> str:
        """The evidence of a systematic serving fault, which no row can mend; "" otherwise."""
        return next((f.evidence for f in self.findings if f.blame == "deployment"), "")


def clusters(
    findings: Sequence[Finding], pairs: Sequence[tuple], patterns: Sequence[Pattern] = (), embedder: str = ""
) -> list[Cluster]:  # fmt: skip
    """The failures grouped, the largest group first. `pairs` are the (row, score) of the run. A failure goes to the
    first pattern that matches it; the others are grouped by cause and by what is wrong: the label, or one field
    under any label. A large group is split by what its messages are about, over TF-IDF or the vectors of `embedder`."""
    by_id, groups, found = {row.id: (row, score) for row, score in pairs}, {}, []
    for f in findings:
        own = next((p for p in patterns if f.blame != "deployment" and p.match(*by_id[f.row_id])), None)
        field = f.field if f.cause in ("wrong label", "tool argument wrong", "hallucinated field") else ""
        label = f.label if f.cause == MISSING or f.cause in BY_LABEL and f.got != f.label else ""
        key = (f.cause, "", f.fault) if f.blame == "deployment" else (f.cause, label, field)
        groups.setdefault((own.name, "", own) if own else key, []).append(f)
    for key, group in groups.items():
        parts = [group] if key[0] == MISSING else _topics(group, [text_of(by_id[f.row_id][0]) for f in group], embedder)
        found += [_cluster(key, part, f" ({n})" * (len(parts) > 1), by_id) for n, part in enumerate(parts, 1)]
    return sorted(found, key=lambda c: (-len(c.findings), c.name))


def cluster_table(found: Sequence[Cluster]) -> list[dict]:
    """One line per cluster."""
    return [
        {"cluster": c.name, "rows": len(c.findings), "taken for": c.got, "about": c.about, "fault of": c.blame,
         "root cause": c.root_cause, "likest in training": ", ".join(c.twins), "by": c.by} for c in found
    ]  # fmt: skip


def rows_table(found: Sequence[Cluster], pairs: Sequence[tuple], most: int = 5) -> list[dict]:
    """The failed rows behind each cluster, `most` of each: what was asked, expected and answered."""
    said = {row.id: {"input": row.user[:160], "answer": score.text[:120]} for row, score in pairs}
    shown = [(c.name, f) for c in found for f in c.findings[:most]]
    return [{"cluster": name, "row": f.row_id, **said[f.row_id], "evidence": f.evidence} for name, f in shown]


def vectors(texts: Sequence[str], embedder: str):
    """Unit vectors of texts, (n, size)."""
    return embed(embedder, texts) if embedder else tfidf(texts)


def _topics(group: list[Finding], texts: list[str], embedder: str) -> list[list[Finding]]:
    """The group in parts of three failures or more, by k-means with the best silhouette (Rousseeuw 1987); whole where
    no split stands out."""
    import numpy as np
    from sklearn.cluster import KMeans
    from sklearn.metrics import silhouette_score

    best, kept = APART, np.zeros(len(group), int)
    if len(group) < SPLIT or not any(map(words, texts)):
        return [group]
    made = vectors(texts, embedder)
    for k in range(2, len(group) // 5 + 1):
        ids = KMeans(k, n_init=5, random_state=0).fit_predict(made)
        if np.bincount(ids).min() >= 3 and (score := silhouette_score(made, ids, metric="cosine")) > best:
            best, kept = score, ids
    return [[f for f, own in zip(group, kept, strict=True) if own == part] for part in dict.fromkeys(kept.tolist())]


def _cluster(key: tuple, group: list[Finding], part: str, by_id: dict[str, tuple]) -> Cluster:
    own, labels = isinstance(key[2], Pattern), {f.label for f in group}
    cause, blame = (_commonest([getattr(f, name) for f in group]) for name in ("cause", "blame"))
    got, label = _commonest([f.got for f in group if f.got != f.label]), labels.pop() if len(labels) == 1 else ""
    got = got if 3 * sum(f.got == got for f in group) >= len(group) else ""
    taken = f", taken for {got}" if got else ""
    taken = f" {got or 'other labels'}" if cause == "answer when it should refuse" else taken
    how = {"label": label or "any label", "field": key[2] or "the label", "got": taken}
    texts = [key[2].situation] if own else [text.format(**how) for text in CAUSES[cause]["situations"]]
    here, everywhere = (Counter(w for row in rows for w in set(words(text_of(row))) if len(w) > 4) for rows in (
        [by_id[f.row_id][0] for f in group], [row for row, _ in by_id.values()]))  # fmt: skip
    apart = {w: n * n / everywhere[w] for w, n in here.items() if n > 1 and n * len(by_id) >= 2 * everywhere[w] * len(group)}
    return Cluster(
        name=(key[0] if own else " / ".join(filter(None, key))) + part, cause=cause, label=label, got=got, blame=blame,
        about=", ".join(sorted(apart, key=lambda w: (-apart[w], w))[:3]), situations=[Cell(situation=t) for t in texts],
        root_cause=next(f.evidence for f in group if f.blame == blame) if blame not in ("data", "model") or cause == MISSING else "",
        findings=group,
    )  # fmt: skip


def _commonest(values: list[str]) -> str:
    return max(sorted(set(values)), key=values.count) if values else ""
