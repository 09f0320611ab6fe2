"""Failures that would be mended by the same rows: the user's own patterns first, then cause, label and field."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from slm.repair.causes import Finding
from slm.rows import Row


@dataclass(frozen=True)
class Pattern:
    """A cluster of the user's own (task/clusters.py). `match(row, score)` says whether a failed row belongs to it;
    `situation` tells the teacher what the rows must show."""

    name: str
    match: Callable[[Row, object], bool]
    situation: str


@dataclass(frozen=True)
class Cluster:
    """Failures of one cause and one label (or one pattern), and the situation that new rows must show."""

    name: str
    cause: str
    label: str
    got: str
    situation: str
    findings: tuple[Finding, ...]

    @property
    def serving(self) -> str:
        """The evidence of a systematic serving fault, which no row can mend; "" otherwise."""
        return next((f.evidence for f in self.findings if f.blame == "deployment"), "")


# What the teacher is asked to show. No text of an evaluation row ever stands here: that would leak it into training.
SITUATIONS = {
    "missing category": "the full breadth of {label}: common and rare situations, each with its own detail",
    "wrong schema": "input that tempts one into invalid output for {label}: braces, quotes, lists, unusual label words",
    "wrong label": "{field} hangs on one detail of the text and is easily got wrong{got}",
    "too verbose": "input that invites an explanation, while the answer is the bare object for {label}",
    "refusal when it should answer": "a real request of {label} in an odd guise: vague, rude, very short, off-topic at first",
    "answer when it should refuse": "nothing to act on, though words of{got} occur: no request, missing facts, spam",
    "tool name wrong": "a request for {label} in words that also fit another tool{got}",
    "tool argument wrong": "{field} is said in an unusual place, order or format, and must be copied right",
    "hallucinated field": "{field} is not in the text, or a look-alike stands in its place",
    "fails long input": "60 to 110 words for {label}; the deciding fact stands late, between side matters",
    "fails adversarial input": "orders to the model, false labels and misleading phrasing around a case of {label}",
}


def clusters(findings: Sequence[Finding], pairs: Sequence[tuple], patterns: Sequence[Pattern] = ()) -> list[Cluster]:
    """The failures grouped, the largest group first. `pairs` are the (row, score) of the run, for the patterns. A
    failure goes to the first pattern that matches it; the others are grouped by cause, label and wrong field."""
    by_id = {row.id: (row, score) for row, score in pairs}
    groups: dict[tuple, list[Finding]] = {}
    for finding in findings:
        deployment = finding.blame == "deployment"
        own = next((p for p in patterns if not deployment and p.match(*by_id[finding.row_id])), None)
        field = finding.field if finding.cause in ("wrong label", "tool argument wrong", "hallucinated field") else ""
        key = (own.name, None, own) if own else (finding.cause, "" if deployment else finding.label, field)
        groups.setdefault(key, []).append(finding)
    found = [_cluster(key, group) for key, group in groups.items()]
    return sorted(found, key=lambda c: (-len(c.findings), c.name))


def cluster_table(found: Sequence[Cluster]) -> list[dict]:
    """One line per cluster."""
    return [
        {"cluster": c.name, "rows": len(c.findings), "cause": c.cause, "label": c.label or "several", "often taken for": c.got,
         "example": c.findings[0].evidence} for c in found
    ]  # fmt: skip


def _cluster(key: tuple, group: list[Finding]) -> Cluster:
    name, label, rest = key
    got = _commonest([f.got for f in group if f.got and f.got != f.label])
    if isinstance(rest, Pattern):
        return Cluster(rest.name, _commonest([f.cause for f in group]), "", got, rest.situation, tuple(group))
    taken = f", taken for {got}" if got else ""
    if name == "answer when it should refuse":
        taken = f" {got or 'other labels'}"
    text = SITUATIONS[name].format(label=label or "any label", field=rest or "the label", got=taken)
    return Cluster(" / ".join(part for part in key if part), name, label, got, text, tuple(group))


def _commonest(values: list[str]) -> str:
    return max(sorted(set(values)), key=values.count) if values else ""
