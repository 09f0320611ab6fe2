"""Every failure gets one of eleven causes by fixed rules, first match wins: the serving is suspected before the model."""

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median_low

import yaml
from pydantic import BaseModel, ConfigDict

from slm.contract import Contract
from slm.evaluate.scorers import Score
from slm.rows import Row

TRAINED = 5  # training rows of a label below which the data is to blame; so is a quarter of what the median label has
SYSTEMATIC = 0.1  # a serving fault in this share of all answers is the deployment's, below it the model's
TEMPLATE = re.compile(r"<\|?[a-z]+_?[a-z]*(?:_id|_header_id|start|end|text)?\|>|</?s>|\[/?INST\]|</?think>|<(?:start|end)_of_turn>")
REFUSAL = re.compile(r"(?i)\b(i'?m sorry|i am sorry|i can(?:no|')t|i am unable|i'm unable|as an ai|i won'?t)\b")

# Cause -> blame (what it usually is a fault of), mend, and situations for the teacher.
CAUSES: dict[str, dict] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))


class Finding(BaseModel):
    """One failed row: its primary cause, the other causes that also match, and the evidence in words. `fault` names a
    serving fault ("error", "echo", "empty", "template", "stop", "length", "parser") or is empty; `blame` is data,
    model, prompt, schema or deployment. `label` is the expected category, `got` the given one, `field` the first
    wrong field."""

    model_config = ConfigDict(extra="forbid")
    row_id: str
    cause: str
    others: list[str] = []
    evidence: str
    fault: str = ""
    blame: str
    label: str
    got: str = ""
    field: str = ""
    kind: str
    difficulty: str


class Case:
    """A failed row with its score, and what the rules ask: labels, wrong fields, all fields flat, the run's facts."""

    def __init__(self, row: Row, score: Score, contract: Contract, trained: dict[str, int] | None, long_words: int):
        self.row, self.score, self.contract, self.trained, self.long_words = row, score, contract, trained, long_words
        self.tool, self.null = contract.task_type == "tool_calling", contract.null_label
        self.read, self.prose = score.parsed is not None, score.lenient_parsed is not None
        self.label = str(contract.label(score.expected) or row.meta.category)
        self.got = str(contract.label(score.parsed or score.lenient_parsed) or "")
        self.want, self.given = contract.flatten(score.expected), contract.flatten(score.parsed)
        self.wrong = [name for name, right in score.fields.items() if not right]
        self.same_label = contract.label_field not in self.wrong
        self.fault, self.sign = serving_fault(score)


def serving_fault(score: Score) -> tuple[str, str]:
    """(fault, evidence) when template, stop token, length limit or parser may be to blame, else ("", "")."""
    text, expected = score.text, json.dumps(score.expected, ensure_ascii=False, separators=(",", ":"))
    if score.parsed is not None:
        return "", ""
    if score.finish_reason == "error":
        return "error", f"the request failed, there is no answer: {text[:80]}"
    if score.shares.get("echo_rate"):
        return "echo", "the answer repeats the prompt: the template does not say where the answer begins"
    if not text.strip():
        return "empty", "the answer is empty: the stop token came first, or the template leaves no room for one"
    if hit := TEMPLATE.search(text):
        return "template", f"a piece of a chat template stands in the answer: {hit.group(0)}"
    if score.finish_reason == "length":
        if score.lenient_parsed is not None:
            return "stop", "the object was complete and the model went on to the token limit: check the end token"
        if len(text) < len(expected):
            return "length", "the token limit cut the answer before a right one could end: raise evaluate.max_new_tokens"
        return "stop", "the answer ran into the token limit without an end"
    if score.lenient_parsed == score.expected:
        return "parser", "the right object stands in the text, with something around it"
    return "", ""


def _trained(case: Case) -> str:
    if case.trained is None:
        return ""
    count, median = case.trained.get(case.label, 0), median_low(case.trained.values() or [0])
    return f"training rows of {case.label}: only {count}, the median label has {median}" if count < max(TRAINED, median / 4) else ""


def _long(case: Case) -> str:
    words = len(case.row.user.split())
    return f"{words} words of input, long from {case.long_words}" if words >= case.long_words else ""


def _refused(case: Case) -> str:
    if case.label == case.null:
        return ""
    if not case.read:
        return f"the answer declines: {hit.group(0)!r}" if (hit := REFUSAL.search(case.score.text)) else ""
    return f"expected {case.label}, got {case.null}" if case.null and case.got == case.null else ""


def _acted(case: Case) -> str:
    acted = case.null and case.label == case.null and case.got not in ("", case.null)
    return f"expected {case.null}, got {case.got}" if acted else ""


def _label(case: Case) -> str:
    return "" if case.same_label else f"{case.contract.label_field}: expected {case.label}, got {case.got}"


def _invented(case: Case) -> str:
    names = [n for n in case.wrong if case.want.get(n) is None and case.given.get(n) is not None]
    return f"{names[0]}: nothing expected, got {case.given[names[0]]!r}" if names and case.same_label else ""


def _extra_key(case: Case) -> str:
    extra = case.score.stage == "schema" and "extra" in case.score.explanation.lower()
    return f"a field that the contract has not: {case.score.explanation}" if extra else ""


def _field(case: Case) -> str:
    if not case.wrong or not case.same_label:
        return ""
    return f"{case.wrong[0]}: expected {case.want.get(case.wrong[0])!r}, got {case.given.get(case.wrong[0])!r}"


# In this order; the first that matches is the primary cause, every other that matches is kept beside it.
RULES: tuple[tuple[str, Callable[[Case], str | bool]], ...] = (
    ("too verbose", lambda c: c.prose and c.sign),
    ("wrong schema", lambda c: not c.prose and c.sign),
    ("fails adversarial input", lambda c: c.row.meta.kind == "adversarial" and "the row is adversarial"),
    ("refusal when it should answer", lambda c: not c.read and _refused(c)),
    ("too verbose", lambda c: not c.read and c.prose and "an object with text around it"),
    ("hallucinated field", lambda c: not c.read and _extra_key(c)),
    ("wrong schema", lambda c: not c.read and f"{c.score.stage}: {c.score.explanation}"),
    ("missing category", _trained),
    ("fails long input", _long),
    ("refusal when it should answer", lambda c: c.read and _refused(c)),
    ("answer when it should refuse", lambda c: c.read and _acted(c)),
    ("tool name wrong", lambda c: c.read and c.tool and _label(c)),
    ("wrong label", lambda c: c.read and not c.tool and _label(c)),
    ("hallucinated field", lambda c: c.read and _invented(c)),
    ("tool argument wrong", lambda c: c.read and c.tool and _field(c)),
    ("wrong label", lambda c: c.read and not c.tool and _field(c)),
)


def diagnose(pairs: Sequence[tuple[Row, Score]], contract: Contract, trained: dict[str, int] | None = None) -> list[Finding]:
    """One finding per failed row of `pairs` (all rows of a run, right ones too: they tell a slip from a system).
    `trained` counts training rows by label; without it "missing category" is not considered. A row is long from twice
    the median number of words, 60 at least."""
    lengths = sorted(len(row.user.split()) for row, _ in pairs) or [0]
    long_words = max(60, 2 * lengths[len(lengths) // 2])
    shares = Counter(serving_fault(score)[0] for _, score in pairs)
    listed = json.dumps([contract.schema, None, "None"], ensure_ascii=False)
    broken = [s for _, s in pairs if s.stage == "schema"]
    odd = {s.row_id: str(contract.label(contract.parse(s.text, lenient=True).value)) for s in broken}
    often = {name for name, n in Counter(odd.values()).items() if n >= TRAINED and f'"{name}"' not in listed}
    found = []
    for row, score in pairs:
        if score.exact:
            continue
        case = Case(row, score, contract, trained, long_words)
        matches = [(cause, evidence) for cause, test in RULES if (evidence := test(case))]
        cause, evidence = matches[0] if matches else ("wrong label", score.explanation)
        blame = "prompt" if case.fault == "echo" else CAUSES[cause]["blame"]
        if odd.get(row.id) in often and not case.fault:
            blame, evidence = "schema", f"{contract.label_field} {odd[row.id]!r} in many answers: no such value in the contract"
        if case.fault == "error" or case.fault and shares[case.fault] >= SYSTEMATIC * len(pairs):
            blame = "deployment"
        found.append(Finding(
            row_id=row.id, cause=cause, others=list(dict.fromkeys(c for c, _ in matches if c != cause)), evidence=evidence,
            fault=case.fault, blame=blame, label=case.label, got=case.got,
            field=next(iter(case.wrong), "") if case.same_label or not contract.label_field else contract.label_field,
            kind=row.meta.kind, difficulty=row.meta.difficulty,
        ))  # fmt: skip
    return found


def table(findings: Sequence[Finding]) -> list[dict]:
    """One line per cause that occurs, most frequent first: rows, blame, an example's evidence, what mends it."""
    lines = []
    for cause, count in Counter(f.cause for f in findings).most_common():
        own = [f for f in findings if f.cause == cause]
        blame = Counter(f.blame for f in own).most_common(1)[0][0]
        mend = f"mend the serving first: {own[0].evidence}" if blame == "deployment" else CAUSES[cause]["mend"]
        lines.append({"cause": cause, "rows": count, "fault of": blame, "example": f"{own[0].row_id}: {own[0].evidence}", "mends it": mend})
    return lines


def plot_causes(findings: Sequence[Finding], path: Path) -> Path:
    """Bars: failed rows per primary cause, all eleven shown. A PNG file."""
    from slm.curate.plots import figure, save

    counts = Counter(f.cause for f in findings)
    names = sorted(CAUSES, key=lambda cause: counts[cause])
    drawn, axes = figure(7, 4)
    bars = axes.barh(names, [counts[name] for name in names], color="#2b6cb0")
    axes.bar_label(bars, padding=3, fontsize=8)
    axes.set(xlabel="failed rows", title=f"{len(findings)} failures by cause")
    return save(drawn, path)
