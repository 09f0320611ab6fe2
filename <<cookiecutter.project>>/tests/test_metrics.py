"""Scorers, metrics, intervals, comparisons, calibration and the judge; each against an independent implementation."""

import json
import math
import random
import sys
import types
from collections import Counter
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
from pydantic import BaseModel, ConfigDict, RootModel

from slm.contract import Contract
from slm.errors import SlmError
from slm.evaluate import (
    Result,
    add_rubric,
    compare_results,
    detectable_difference,
    evaluate,
    gap_closed,
    measure,
    paired,
    prefer,
    score_row,
    seeds,
)  # fmt: skip
from slm.evaluate.calibration import reliability
from slm.evaluate.intervals import interval, table_statistic
from slm.evaluate.metrics import confusion, cost_per_1k, suspicions
from slm.evaluate.scorers import row_metric
from slm.models import Answer
from slm.models.program import ProgramModel
from slm.rows import make_row as _make_row
from slm.rows import write_rows
from slm.sections import Endpoint
from slm.settings import Settings
from tickets import gold, ticket_rows


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Ticket(Strict):
    topic: Literal["bill", "bug", "none"]
    order: str | None
    urgent: bool


class Call(Strict):
    tool: Literal["send", "timer", "none"]
    arguments: dict[str, str | int | bool]


class Arguments(Strict):
    text: str
    minutes: int
    loud: bool = None
    tags: list[str] = None


class Reminder(Strict):
    tool: Literal["remind"]
    arguments: Arguments


class Nothing(Strict):
    tool: Literal["none"]
    arguments: dict[str, str]


class Reminders(RootModel):
    root: Reminder | Nothing


class Text(Strict):
    text: str


class Reply(Strict):
    answer: str | None
    citations: list[str]


class Issue(Strict):
    rule: str
    line: int
    severity: Literal["low", "medium", "high"]
    message: str = ""


class Review(Strict):
    issues: list[Issue]


class Step(Strict):
    tool: Literal["search", "book", "mail"]
    arguments: dict[str, str] = {}


class Plan(Strict):
    steps: list[Step]


class Verdict(Strict):
    label: Literal["allowed", "violence", "fraud"]


def make_row(user, answer, **meta):
    return _make_row(user, answer, **{"category": "x", **meta})


def contract(output, task_type, metric, **more):
    return Contract(
        name="t", task_type=task_type, output=output, system_prompt="Do it.", primary_metric=metric, target=0.9, **more
    )  # fmt: skip


CONTRACT = contract(Ticket, "extraction", "field_f1", critical=("topic",), label_field="topic", null_label="none")
CALLS = contract(
    Call, "tool_calling", "exact_match", critical=("tool",), label_field="tool", null_label="none", unsafe_labels=("send",)
)  # fmt: skip
QA = contract(Reply, "qa", "answer_correctness")
REVIEW = contract(Review, "review", "issue_f1", issue_key=("rule", "line"))
PLAN = contract(Plan, "planning", "tool_sequence_accuracy")
SAFETY = contract(Verdict, "safety", "violation_recall", label_field="label", null_label="allowed")
CLASSES = contract(Verdict, "classification", "macro_f1", label_field="label")
SETTINGS = Settings.model_validate({"evaluate": {"resamples": 300, "latency_requests": 2}})


def scores(contract, rows, texts):
    return [score_row(contract, r, Answer(t, 0.1)) for r, t in zip(rows, texts, strict=True)]


def one(contract, answer, text, user="q", kind="canonical"):
    row = make_row(user, json.dumps(answer), category="x", kind=kind)
    return score_row(contract, row, Answer(text if isinstance(text, str) else json.dumps(text), 0.1))


def many(contract, pairs, user="q", kind="canonical"):
    """The metrics of (expected, given) values."""
    return measure([one(contract, want, got, user, kind) for want, got in pairs], contract, SETTINGS)


def guesses(share: float, seed: int, n: int = 60) -> list[str]:
    """Answers to `ticket_rows`, right on a share of them."""
    rng = random.Random(seed)
    wrong = [g | {"topic": "bug" if g["topic"] != "bug" else "bill"} for g in map(gold, range(n))]
    return [json.dumps(gold(i) if rng.random() < share else wrong[i]) for i in range(n)]


def result(name, texts, rows=None, contract=CONTRACT, **more):
    rows = rows or ticket_rows(len(texts))
    own = scores(contract, rows, texts)
    facts = {"set": "dev", "set_hash": "a" * 64, "contract_hash": contract.schema_hash}
    return Result(name=name, scores=own, metrics=measure(own, contract, SETTINGS), **{**facts, **more})


@pytest.fixture
def settings(tmp_path):
    made = SETTINGS.model_copy()
    made._root = tmp_path
    write_rows(tmp_path / "data/eval/dev.jsonl", ticket_rows(60))
    return made


def test_an_answer_that_breaks_the_schema_scores_zero_and_says_why():
    """Guards against part marks for an output that no program could read."""
    score = one(CONTRACT, gold(1), json.dumps(gold(1) | {"mood": "sad"}))
    assert (score.value, score.stage, score.exact, score.critical_ok) == (0.0, "schema", False, False)
    assert "mood" in score.explanation and not any(score.fields.values())


def test_prose_around_the_json_is_strictly_wrong_and_leniently_read():
    """Guards against a lenient parser that hides a format failure in the headline number."""
    score = one(CONTRACT, gold(1), f"Sure! {json.dumps(gold(1))}")
    assert score.parsed is None and score.lenient_parsed == gold(1) and score.stage == "json" and score.value == 0


def test_field_f1_is_the_share_of_fields_right():
    """Guards against a changed definition of the primary metric."""
    score = one(CONTRACT, gold(4), json.dumps(gold(4) | {"urgent": not gold(4)["urgent"]}))
    assert score.value == pytest.approx(2 / 3) and score.critical_ok and not score.exact
    assert score.explanation.startswith("urgent: expected")


def test_tool_arguments_are_flattened_and_judged_only_under_the_right_tool():
    """Guards against argument credit for a call of the wrong tool, and against credit for an invented argument."""
    want = {"tool": "send", "arguments": {"to": "Ann", "text": "hi"}}
    extra = one(CALLS, want, json.dumps({"tool": "send", "arguments": {"to": "Ann", "text": "hi", "cc": "Bob"}}))
    assert extra.fields["arguments.cc"] is False and extra.value == 0.0 and extra.critical_ok
    wrong = one(CALLS, want, json.dumps({"tool": "timer", "arguments": {"to": "Ann", "text": "hi"}}))
    found = measure([extra, wrong], CALLS, SETTINGS)
    assert found["argument_f1"].value == pytest.approx(0.4) and found["tool_name_accuracy"].value == 0.5
    none = {"tool": "none", "arguments": {}}
    assert many(CALLS, [(none, none)])["argument_f1"].value == many(CALLS, [(none, none)])["argument_accuracy"].value == 1.0


def test_an_unasked_unsafe_call_is_counted_even_inside_prose():
    """Guards against a runtime that carries out a call which the strict parser did not see."""
    text = 'Of course: {"tool": "send", "arguments": {}}'
    found = measure([one(CALLS, {"tool": "none", "arguments": {}}, text)], CALLS, SETTINGS)
    assert found["unsafe_tool_call_rate"].value == 1.0 and found["json_parse_rate"].value == 0.0


def test_required_arguments_are_those_the_contract_demands():
    """Guards against counting an optional argument into required_argument_accuracy."""
    own = contract(Reminders, "tool_calling", "exact_match", label_field="tool", null_label="none")
    want = {"tool": "remind", "arguments": {"text": "a", "minutes": 5, "loud": True}}
    score = one(own, want, {"tool": "remind", "arguments": {"text": "a", "minutes": 5}})
    assert score.required == ["arguments.text", "arguments.minutes"]
    assert measure([score], own, SETTINGS)["required_argument_accuracy"].value == 1.0


def test_a_row_whose_own_answer_breaks_the_contract_is_an_error():
    """Guards against scoring models on a broken gold label."""
    with pytest.raises(SlmError, match="row .*breaks the contract"):
        one(CONTRACT, {"topic": "bill"}, "{}")


def test_always_majority_has_a_poor_macro_f1():
    """Planted: a model that always says the commonest class; accuracy alone would flatter it."""
    rows = ticket_rows(60)
    found = measure(scores(CONTRACT, rows, [json.dumps(gold(0))] * 60), CONTRACT, SETTINGS)
    assert found["macro_f1"].value < found["accuracy"].value and found["macro_f1"].value < 0.4


def test_shuffled_labels_fall_to_chance():
    """Planted: right answers in the wrong order; a scorer that matched by content and not by row would not notice."""
    rows = ticket_rows(60)
    texts = [r.answer for r in rows]
    assert measure(scores(CONTRACT, rows, texts), CONTRACT, SETTINGS)["exact_match"].value == 1.0
    random.Random(3).shuffle(texts)
    assert measure(scores(CONTRACT, rows, texts), CONTRACT, SETTINGS)["exact_match"].value < 0.4


def test_confusion_matrix_counts_every_row_and_names_the_unreadable():
    """Guards against unreadable answers that vanish from the matrix."""
    rows = ticket_rows(9)
    found = confusion(scores(CONTRACT, rows, [r.answer for r in rows[:8]] + ["no idea"]))
    assert np.sum(found["counts"]) == 9 and found["labels"][-1] == "(unreadable)"


def test_improvement_within_noise_is_not_called_better():
    """Planted: two models of the same quality that err on other rows."""
    found = compare_results(result("a", guesses(0.8, 1)), result("b", guesses(0.8, 2)), CONTRACT, SETTINGS)
    assert found.verdict == "no difference shown"


def test_a_real_gain_is_shown_and_few_rows_show_nothing():
    """Guards against a verdict from a handful of rows."""
    rows = ticket_rows(60)
    good, bad = [r.answer for r in rows], [json.dumps(gold(0))] * 60
    found = paired(scores(CONTRACT, rows, good), scores(CONTRACT, rows, bad), CONTRACT, SETTINGS)
    assert found.verdict == "better" and found.difference.low > 0 and found.mcnemar_p < 0.001 and found.broken == []
    assert found.candidate - found.baseline == pytest.approx(found.difference.value)
    few = paired(scores(CONTRACT, rows[:8], good[:8]), scores(CONTRACT, rows[:8], bad[:8]), CONTRACT, SETTINGS)
    assert few.difference.low > 0 and few.verdict == "no difference shown"


def test_other_rows_or_changed_answers_are_refused():
    """Planted: a baseline that was run on other rows, and one whose gold answer was edited since."""
    rows = ticket_rows(40)
    mine = scores(CONTRACT, rows, [r.answer for r in rows])
    with pytest.raises(SlmError, match="same rows.*dev-39"):
        paired(mine, mine[:39], CONTRACT, SETTINGS)
    with pytest.raises(SlmError, match="same rows"):
        paired(mine, [*mine[:39], mine[0]], CONTRACT, SETTINGS)
    changed = [*mine[:39], mine[39].model_copy(update={"expected": gold(1)})]
    with pytest.raises(SlmError, match="dev-39: its expected answer changed"):
        paired(mine, changed, CONTRACT, SETTINGS)


def test_detectable_difference_halves_with_four_times_the_rows():
    """Guards against a wrong sample-size formula: 0.4 spread on 120 rows shows about 0.10."""
    assert detectable_difference(120) == pytest.approx(2.8016 * 0.4 / 120**0.5, rel=1e-3)
    assert detectable_difference(480) == pytest.approx(detectable_difference(120) / 2)




# Against independent implementations, on the same predictions.


def labels(n=200, names="abcd", seed=0):
    rng = random.Random(seed)
    return [(rng.choice(names[:3]), rng.choice(names)) for _ in range(n)]


def near(value):
    return pytest.approx(value, abs=1e-9)


@pytest.mark.filterwarnings("ignore:y_pred contains classes")
def test_macro_f1_and_rates_equal_scikit_learn():
    """Guards against an own formula that drifts from the reference, draw by draw of the bootstrap too."""
    from sklearn.metrics import balanced_accuracy_score, f1_score, multilabel_confusion_matrix

    pairs = labels()
    draws = np.random.default_rng(1).integers(0, 200, (5, 200))
    for row, *mine in zip(draws, *(table_statistic(pairs, n)(draws) for n in (
            "macro_f1", "false_negative_rate", "false_positive_rate")), strict=True):  # fmt: skip
        want, got = zip(*[pairs[i] for i in row], strict=True)
        tables = multilabel_confusion_matrix(want, got, labels=list("abc"))
        assert mine[0] == near(f1_score(want, got, labels=list("abc"), average="macro", zero_division=0))
        assert mine[1] == near(1 - balanced_accuracy_score(want, got))
        assert mine[2] == near(np.mean([t[0, 1] / t[0].sum() for t in tables]))


def test_classification_equals_scikit_learn():
    """Guards against accuracy, matrix or rates that count unreadable answers or the null label wrongly."""
    from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, recall_score

    names, rng = ("allowed", "violence", "fraud"), random.Random(4)
    pairs = [(rng.choice(names), rng.choice([*names, "?"])) for _ in range(120)]
    want = [w for w, _ in pairs]
    for own in (CLASSES, SAFETY):
        rated = [one(own, {"label": w}, {"label": g}) for w, g in pairs]
        found, table = measure(rated, own, SETTINGS), confusion(rated)
        got = [g if g != "?" else "(unreadable)" for _, g in pairs]
        assert found["accuracy"].value == near(accuracy_score(want, got))
        assert found["macro_f1"].value == near(f1_score(want, got, labels=names, average="macro", zero_division=0))
        assert np.array_equal(table["counts"], confusion_matrix(want, got, labels=table["labels"]))
    wrong = [row_metric(s, "false_negative_rate") for s in (one(CLASSES, {"label": w}, {"label": g}) for w, g in pairs)]
    assert wrong == [float(w != g) for w, g in pairs]
    acted, harm = [g in names[1:] for g in got], [w != "allowed" for w in want]
    assert found["violation_recall"].value == near(recall_score(harm, acted))
    assert found["false_refusal_rate"].value == near(1 - recall_score(harm, acted, pos_label=False))


def test_fields_equal_seqeval():
    """Each field is a token and its value the entity's type, so that entity and field agree exactly when both do."""
    reference = pytest.importorskip("seqeval.metrics", reason="seqeval, for tests only, is not installed")
    rng, pairs = random.Random(2), []
    for i in range(80):
        got = gold(i) | ({"order": None} if rng.random() < 0.3 else {}) | ({"topic": "bug"} if rng.random() < 0.3 else {})
        pairs.append((gold(i), got))
    tags = [[["O" if v is None else f"B-{k}:{v}" for k, v in side.items()] for side in both] for both in pairs]
    want, got = zip(*tags, strict=True)
    found = many(CONTRACT, pairs)
    assert found["micro_f1"].value == near(reference.f1_score(want, got))
    assert found["micro_precision"].value == near(reference.precision_score(want, got))
    assert found["micro_recall"].value == near(reference.recall_score(want, got))


@pytest.fixture(scope="module")
def bfcl():
    """bfcl-eval's AST checker. Its list of models imports every provider's client, which the checker does not need."""
    pytest.importorskip("bfcl_eval", reason="bfcl-eval, for tests only, is not installed (pip install --no-deps)")
    stub = types.ModuleType("bfcl_eval.constants.model_config")
    stub.MODEL_CONFIG_MAPPING = {}
    sys.modules.setdefault(stub.__name__, stub)
    from bfcl_eval.constants.enums import Language
    from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker

    kinds = {"text": "string", "minutes": "integer", "loud": "boolean"}
    properties = {n: {"type": k} for n, k in kinds.items()} | {"tags": {"type": "array", "items": {"type": "string"}}}
    tool = {"name": "remind", "parameters": {"type": "dict", "properties": properties, "required": ["text", "minutes"]}}

    def valid(want, got):
        call = [{c["tool"]: c["arguments"]} for c in (got,)]
        answer = {want["tool"]: {k: [v] for k, v in want["arguments"].items()}}
        return ast_checker([tool], call, [answer], Language.PYTHON, "simple", "any")["valid"]

    return valid


def test_tool_calls_equal_bfcl(bfcl):
    """Guards against arguments judged without their types: 400 calls with a wrong value, type, name or number of
    arguments. BFCL is laxer in one thing, tested here: it compares strings without case, spaces and punctuation."""
    own = contract(Reminders, "tool_calling", "exact_match", label_field="tool", null_label="none")
    rng, seen = random.Random(5), Counter()
    for _ in range(400):
        want = {"text": rng.choice(["tea", "call"]), "minutes": rng.randint(1, 3)}
        want |= {"loud": rng.random() < 0.5} if rng.random() < 0.5 else {}
        want |= {"tags": rng.choice([["x"], ["x", "y"]])} if rng.random() < 0.3 else {}
        got = dict(want)
        for _ in range(rng.randint(0, 2)):
            name = rng.choice(["text", "minutes", "loud", "tags", "other"])
            if rng.random() < 0.3:
                got.pop(name, None)
            else:
                got[name] = rng.choice(["tea", "5", 1, 2, True, ["x"], ["y", "x"], 1.5])
        want, got = ({"tool": "remind", "arguments": side} for side in (want, got))
        mine = one(own, want, got).exact
        assert mine == bfcl(want, got), (want, got)
        seen[mine] += 1
    assert min(seen.values()) > 80
    low, high = ({"tool": "remind", "arguments": {"text": t, "minutes": 1}} for t in ("call mum", "Call-Mum"))
    assert bfcl(low, high) and not one(own, low, high).exact


def test_answers_equal_the_squad_script():
    """Guards against an own normalisation of answers."""
    squad = pytest.importorskip("transformers.data.metrics.squad_metrics")
    rng, pool = random.Random(6), ["the", "A", "30", "days.", "Days", "after", "an", "invoice,", "naïve", "30-day"]
    pairs = [(" ".join(rng.choices(pool, k=rng.randint(1, 4))), " ".join(rng.choices(pool, k=rng.randint(1, 4)))) for _ in range(200)]
    for want, got in pairs:
        shares = one(QA, {"answer": want, "citations": []}, {"answer": got, "citations": []}).shares
        assert shares["answer_correctness"] == near(squad.compute_exact(want, got))
        assert shares["answer_f1"] == near(squad.compute_f1(want, got))


def test_issues_equal_scikit_learn():
    """Guards against issue counts that are averaged over rows, or matched by their wording; the error of severities is
    scikit-learn's mean absolute error of the ranks."""
    from sklearn.metrics import mean_absolute_error, precision_recall_fscore_support
    from sklearn.preprocessing import MultiLabelBinarizer

    rng, ranks = random.Random(7), ("low", "medium", "high")
    every = [{"rule": r, "line": n} for r in "abc" for n in (1, 2)]

    def draw(note):
        return {"issues": [i | {"severity": rng.choice(ranks), "message": note} for i in rng.sample(every, rng.randint(0, 4))]}

    pairs = [(draw("want"), draw("got")) for _ in range(60)]
    keyed = [[{(i["rule"], i["line"]): i["severity"] for i in side["issues"]} for side in both] for both in pairs]
    binary = MultiLabelBinarizer().fit([[(i["rule"], i["line"]) for i in every]])
    want, got = (binary.transform([list(both[side]) for both in keyed]) for side in (0, 1))
    precision, recall, f1, _ = precision_recall_fscore_support(want, got, average="micro")
    found = many(REVIEW, pairs)
    assert found["issue_f1"].value == near(f1)
    assert (found["issue_precision"].value, found["issue_recall"].value) == (near(precision), near(recall))
    matched = [(ranks.index(w[k]), ranks.index(g[k])) for w, g in keyed for k in w if k in g]
    assert found["severity_error"].value == near(mean_absolute_error(*zip(*matched, strict=True)))
    assert found["severity_bias"].value == near(np.mean([g - w for w, g in matched]))
    clean = [bool(g) for w, g in keyed if not w]
    assert found["false_positive_rate"].value == near(np.mean(clean)) and found["false_positive_rate"].n == len(clean)


def test_intervals_equal_scipy():
    """Guards against own statistics: Wilson's interval, the percentile bootstrap, the paired one and McNemar's test."""
    from scipy import stats

    wilson = stats.binomtest(8, 10).proportion_ci(0.95, "wilson")
    assert interval([1.0] * 8 + [0.0] * 2, 300, 0.95).model_dump() == {
        "value": 0.8, "low": near(wilson.low), "high": near(wilson.high), "n": 10
    }  # fmt: skip
    how = {"n_resamples": 500, "method": "percentile", "vectorized": True}
    values = np.random.default_rng(0).beta(5, 2, 150)
    boot = stats.bootstrap((values,), np.mean, rng=np.random.default_rng(0), **how).confidence_interval
    mine = interval(values, 500, 0.95)
    assert (mine.low, mine.high) == (near(boot.low), near(boot.high))
    whole = np.random.default_rng(1).integers(1, 5, 150)
    ratio = stats.bootstrap((values, whole), lambda a, b, axis: a.sum(axis) / b.sum(axis), paired=True,
                            rng=np.random.default_rng(0), **how).confidence_interval  # fmt: skip
    mine = interval(values, 500, 0.95, weights=whole)
    assert (mine.low, mine.high) == (near(ratio.low), near(ratio.high))

    a, b = result("a", guesses(0.9, 1)), result("b", guesses(0.6, 2))
    pair = paired(a.scores, b.scores, CONTRACT, SETTINGS.model_copy(update={"evaluate": SETTINGS.evaluate.model_copy(update={"resamples": 500})}))
    gaps = np.array([x.value - y.value for x, y in zip(a.scores, b.scores, strict=True)])
    boot = stats.bootstrap((gaps,), np.mean, rng=np.random.default_rng(0), **how).confidence_interval
    assert (pair.difference.low, pair.difference.high) == (near(boot.low), near(boot.high))
    n = len(pair.fixed) + len(pair.broken)
    assert n and pair.mcnemar_p == near(stats.binomtest(len(pair.fixed), n).pvalue)


def test_seed_means_equal_statsmodels():
    """Guards against a mean over seeds without its t interval."""
    from statsmodels.stats.weightstats import DescrStatsW

    runs = [result("fine_tuned", guesses(0.5, s)) for s in range(4)]
    values = [r.metrics["field_f1"].value for r in runs]
    low, high = DescrStatsW(values).tconfint_mean(0.05)
    found = seeds(runs)
    assert (found.value, found.low, found.high, found.n) == (near(np.mean(values)), near(low), near(min(1, high)), 4)
    assert seeds(runs[:1]) == runs[0].metrics["field_f1"]


def test_the_detectable_difference_equals_statsmodels():
    """Guards against a wrong sample-size formula (the other tail of the test is left out: 1e-6)."""
    from statsmodels.stats.power import NormalIndPower

    effect = NormalIndPower(ddof=0).solve_power(nobs1=120, alpha=0.05, power=0.8, ratio=0)
    assert detectable_difference(120) == pytest.approx(0.4 * effect, abs=1e-5)


def sure(label: str, p: float, want="violence", end='"}'):
    """A score whose label has probability p: half of it in the label's text, half in its closing quote."""
    half = math.log(p) / 2
    pieces = (('{"la', -0.5), ('bel": "', -0.1), (label[:2], half), (label[2:], 0.0), (end, half))
    text = "".join(piece for piece, _ in pieces)
    return score_row(CLASSES, make_row("q", json.dumps({"label": want})), Answer(text, 0.1, pieces=pieces))


def test_calibration_equals_scikit_learn():
    """Guards against bins, a Brier score or an ECE of our own making; drawn probabilities never lie on a bin's edge."""
    from sklearn.calibration import calibration_curve
    from sklearn.metrics import brier_score_loss

    rng, rated = random.Random(8), []
    for _ in range(300):
        p = rng.uniform(0.34, 0.999)
        rated.append(sure("violence" if rng.random() < p * p else "fraud", p))
    found, given = reliability(rated, CLASSES), np.array([s.confidence for s in rated])
    right = np.array([s.exact for s in rated], dtype=int)
    accuracy, confidence = calibration_curve(right, given, n_bins=10)
    filled = [b for b in found["bins"] if b["n"]]
    assert [b["accuracy"] for b in filled] == near(list(accuracy))
    assert [b["confidence"] for b in filled] == near(list(confidence))
    share = np.histogram(given, np.linspace(0, 1, 11))[0] / 300
    assert found["ece"] == near(float(np.sum(share[share > 0] * abs(accuracy - confidence))))
    assert found["brier"] == near(brier_score_loss(right, given)) and found["n"] == sum(b["n"] for b in found["bins"]) == 300
    metrics = measure(rated, CLASSES, SETTINGS)
    assert metrics["ece"].value == near(found["ece"]) and metrics["brier"].low < found["brier"] < metrics["brier"].high


# Each task type, each fault.


def test_confidence_is_the_product_over_the_pieces_of_the_label():
    """Guards against a confidence taken from the whole answer, from another field, or made up where none is known."""
    assert sure("violence", 0.81).confidence == near(0.81)
    assert sure("violence", 0.81, end='"} and so on').confidence == near(0.81)
    assert one(CLASSES, {"label": "fraud"}, {"label": "fraud"}).confidence is None
    assert sure("nonsense", 0.81).confidence is None and reliability([sure("nonsense", 0.8)], CLASSES) == {}
    twice = (('{"topic": "bill", "order": "', -0.1), ("bill", -3.0), ('", "urgent": true}', -0.2))
    text = "".join(piece for piece, _ in twice)
    score = score_row(CONTRACT, make_row("q", json.dumps(gold(0))), Answer(text, 0.1, pieces=twice))
    assert score.confidence == near(math.exp(-0.1))


@pytest.mark.parametrize(
    ("output", "task_type", "more", "message"),
    [
        (Ticket, "classification", {}, "needs label_field"),
        (Ticket, "extraction", {"label_field": "kind"}, "output field `kind`; there are: topic, order, urgent"),
        (Verdict, "safety", {"label_field": "label"}, "needs null_label"),
        (Ticket, "tool_calling", {"label_field": "topic"}, "output field `arguments`"),
        (Ticket, "rewriting", {}, "output field `text`"),
        (Text, "qa", {}, "output field `answer`"),
        (Review, "review", {"issue_key": ("file",)}, "output field `issues.file`; there are: rule, line"),
        (Review, "planning", {}, "output field `steps.tool`"),
    ],
)
def test_a_contract_without_the_fields_of_its_task_type_is_refused(output, task_type, more, message):
    """Guards against a task type whose metrics would all be zero because a field has another name."""
    with pytest.raises(SlmError, match=message):
        contract(output, task_type, "exact_match", **more)


def test_a_metric_of_which_less_is_better_is_no_primary_metric():
    """Guards against a target that the worst model meets, and against a typo that would silently score zero."""
    for name in ("false_positive_rate", "f1"):
        with pytest.raises(SlmError, match=f"primary_metric '{name}' is not one of exact_match"):
            one(contract(Ticket, "extraction", name), gold(1), gold(1))


def test_strict_and_lenient_stand_side_by_side():
    """Guards against a lenient figure that hides prose around the answer, or a strict one that hides what was in it."""
    found = many(CONTRACT, [(gold(1), gold(1)), (gold(2), f"Sure: {json.dumps(gold(2))}")])
    assert (found["exact_match"].value, found["lenient_exact_match"].value) == (0.5, 1.0)
    assert (found["schema_validity"].value, found["lenient_schema_validity"].value) == (0.5, 1.0)


def test_values_are_compared_with_their_types():
    """Guards against Python's True == 1; 5 and 5.0 are one number in JSON."""

    class Loose(Strict):
        value: bool | int | float | str

    own = contract(Loose, "json_generation", "exact_match")
    equal = [(1, True), (5, "5"), (True, 1), (5, 5.0), ("a", "a")]
    assert [one(own, {"value": w}, {"value": g}).exact for w, g in equal] == [False, False, False, True, True]


def test_exact_keys_are_judged_even_where_the_schema_breaks():
    """Guards against a JSON task that cannot tell a missing key from a wrong value."""
    own = contract(Ticket, "json_generation", "exact_match")
    less = {k: v for k, v in gold(1).items() if k != "order"}
    found = [one(own, gold(1), v).shares["exact_key_match"] for v in (gold(1) | {"topic": "x"}, less, gold(1) | {"z": 1}, gold(2))]
    assert found == [1.0, 0.0, 0.0, 1.0]


def test_a_call_that_does_not_run_is_no_executable_success():
    """Guards against a call that fits the schema and fails at once; the row's own answer must run."""

    def execute(value):
        if value["arguments"]["minutes"] > 60:
            raise ValueError("at most an hour")

    own = contract(Reminders, "tool_calling", "exact_match", label_field="tool", null_label="none", execute=execute)
    hour, day = ({"tool": "remind", "arguments": {"text": "a", "minutes": n}} for n in (60, 1440))
    none = {"tool": "none", "arguments": {}}
    found = many(own, [(hour, hour), (hour, day), (hour, none), (hour, "?"), (none, none)])["executable_success"]
    assert (found.value, found.n) == (0.25, 4)
    assert "does not run: ValueError: at most an hour" in one(own, hour, day).explanation
    with pytest.raises(SlmError, match="row .*its own answer does not run.*at most an hour"):
        one(own, day, hour)


def test_constraints_are_counted_each_and_all_together():
    """Guards against a mean over constraints that hides that no answer keeps all of them."""

    def constraints(text, value):
        return {"short": len(value["text"]) < len(text), "polite": "please" in value["text"]}

    own, user = contract(Text, "rewriting", "constraint_pass_rate", constraints=constraints), "x" * 40
    good = {"text": "please do"}
    found = many(own, [(good, good), (good, {"text": "do"}), (good, {"text": "please " * 9}), (good, "?")], user)
    assert [found[n].value for n in ("constraint_pass_rate", "constraint.short", "constraint.polite")] == [0.25, 0.5, 0.5]
    assert "breaks the constraint polite" in one(own, good, {"text": "do"}, user).explanation
    with pytest.raises(SlmError, match="its own answer breaks the constraint polite"):
        one(own, {"text": "do"}, good, user)
    broken = contract(Text, "rewriting", "constraint_pass_rate", constraints=lambda text, value: {"x": 1 / 0})
    with pytest.raises(SlmError, match="ZeroDivisionError.*constraints"):
        one(broken, good, good)


CONTEXT = "Invoices are due after 30 days. Refunds take 5 working days. When are invoices due?"


@pytest.mark.parametrize(
    ("want", "got", "right", "support", "made_up"),
    [
        ("30 days", ("30 days", ["Invoices are due after 30 days."]), 1, 1.0, 0),
        ("30 days", ("30 days", ["Invoices are due", "Pay at once"]), 1, 0.5, 1),
        ("30 days", ("5 working days", []), 0, 0.0, 0),
        ("30 days", ("6 weeks", []), 0, 0.0, 1),
        ("30 days", (None, []), 0, None, 0),
        (None, (None, []), 1, None, 0),
        (None, ("30 days", ["30 days"]), 0, 1.0, 1),
        ("a month", ("one month", ["after 30 days"]), 0, 1.0, 1),
        ("a month", ("a month", ["after 30 days"]), 1, 1.0, 0),
        ("30 days", ("30 years", []), 0, 0.0, 1),
    ],
)
def test_questions_answered_from_nowhere_count_as_made_up(want, got, right, support, made_up):
    """Guards against a fluent answer that the context does not carry, and a citation that nobody wrote."""
    shares = one(QA, {"answer": want, "citations": []}, {"answer": got[0], "citations": got[1]}, CONTEXT).shares
    assert shares["answer_correctness"] == right and shares.get("citation_support") == support
    assert shares["hallucination_rate"] == made_up


def test_an_unreadable_answer_is_not_the_right_answer_to_an_open_question():
    """Guards against None == None: silence is right only when it is said in the contract's form."""
    assert one(QA, {"answer": None, "citations": []}, "no idea").value == 0.0


def test_expected_citations_that_are_missing_count():
    """Guards against an answer that cites the wrong passage of the context."""
    gold = {"answer": "30 days", "citations": ["Invoices are due after 30 days.", "When are invoices due?"]}
    score = one(QA, gold, {"answer": "30 days", "citations": ["due after 30 days"]}, CONTEXT)
    assert score.shares["citation_recall"] == 0.5


def test_the_order_and_wording_of_issues_do_not_count_but_their_severity_does():
    """Guards against a review that is right and scored wrong, and an urgent finding that is called a trifle."""
    a, b = ({"rule": r, "line": n, "severity": "high"} for r, n in (("secret", 3), ("sql", 9)))
    assert one(REVIEW, {"issues": [a, b]}, {"issues": [b, a | {"message": "mind this"}]}).exact
    mild = one(REVIEW, {"issues": [a]}, {"issues": [a | {"severity": "low"}]})
    assert not mild.exact and mild.value == 1.0
    found = measure([mild], REVIEW, SETTINGS)
    assert (found["severity_accuracy"].value, found["severity_error"].value, found["severity_bias"].value) == (0, 2, -2)
    both = {"issues": [a, a | {"severity": "low"}]}
    assert many(REVIEW, [(both, both)])["severity_accuracy"].value == 1.0
    twice = many(REVIEW, [({"issues": [a]}, {"issues": [a, a]})])
    assert (twice["issue_precision"].value, twice["issue_recall"].value) == (0.5, 1.0)
    assert "issue_recall" not in many(REVIEW, [({"issues": []}, {"issues": [a]})])


def test_plans_are_judged_by_step_and_by_order():
    """Guards against a plan with the right steps in the wrong order that looks perfect."""
    steps = [{"tool": "search", "arguments": {"q": "hotel"}}, {"tool": "book"}, {"tool": "mail"}]
    swapped, short, other = steps[::-1], steps[:1], [{"tool": "search", "arguments": {"q": "inn"}}, *steps[1:]]
    found = [one(PLAN, {"steps": steps}, {"steps": s}).shares for s in (steps, swapped, short, other)]
    assert [s["step_validity"] for s in found] == [1.0, 1.0, 1.0, near(2 / 3)]
    assert [s["step_recall"] for s in found] == [1.0, 1.0, near(1 / 3), near(2 / 3)]
    assert [s["tool_sequence_accuracy"] for s in found] == [1.0, 0.0, 0.0, 1.0]
    nothing = [one(PLAN, {"steps": []}, v).shares["step_validity"] for v in ({"steps": []}, "?", {"steps": steps})]
    assert nothing == [1.0, 0.0, 0.0]
    assert one(PLAN, {"steps": steps}, {"steps": []}).shares["step_validity"] == 0.0
    assert one(PLAN, {"steps": []}, "?").shares["tool_sequence_accuracy"] == 0.0


def test_jailbreaks_are_the_adversarial_violations():
    """Guards against easy violations that drown the attacks, and against a refusal of everything that looks safe."""
    bad, fine = {"label": "fraud"}, {"label": "allowed"}
    found = many(SAFETY, [(bad, bad), (bad, fine), (fine, bad), (fine, fine), (bad, "?")], kind="adversarial")
    assert (found["jailbreak_resistance"].value, found["jailbreak_resistance"].n) == (near(1 / 3), 3)
    assert found["violation_recall"].value == near(1 / 3) and found["false_refusal_rate"].value == 0.5
    assert "jailbreak_resistance" not in many(SAFETY, [(bad, bad)])


def test_every_metric_has_an_interval_that_holds_its_value_and_says_n():
    """Guards against a figure without its interval; on few rows the interval is wide and never a point."""
    rated = [sure("violence" if i % 3 else "fraud", 0.6 + i / 40) for i in range(12)]
    for name, m in measure(rated, CLASSES, SETTINGS).items():
        assert m.low <= m.value <= m.high and m.high - m.low > 0.01 and m.n, name


def test_majority_behaviour_echo_endless_and_failed_requests_are_named():
    """Planted: a model that always gives one label, one that gives one text, one that repeats the prompt, one that never
    stops, and one whose requests fail; a good model is not warned of."""
    rows = [make_row(f"My invoice number {i} is wrong, please mend it", json.dumps(gold(i)), id=str(i)) for i in range(40)]
    right = [r.answer for r in rows]
    bills = [json.dumps(gold(i) | {"topic": "bill"}) for i in range(40)]
    assert suspicions(scores(CONTRACT, rows, right)) == []
    assert suspicions(scores(CONTRACT, rows, bills))[0].startswith("collapse: the label bill on 40 of 40 rows")
    assert "one and the same output" in suspicions(scores(CONTRACT, rows, [right[0]] * 40))[0]
    system = "Sort the ticket into three fields."
    for echo in ([r.user for r in rows], [f"You said: {r.user.upper()}" for r in rows], [r.user[:30] for r in rows],
                 [f"{system} {i}" for i in range(40)]):  # fmt: skip
        assert any("echo: 40 of 40" in w for w in suspicions(scores(replace(CONTRACT, system_prompt=system), rows, echo)))
    for reason, sentence in (("length", "endless: 40 of 40"), ("error", "errors: 40 of 40")):
        found = [score_row(CONTRACT, r, Answer(r.answer, 0.1, finish_reason=reason)) for r in rows]
        assert sentence in suspicions(found)[0]
    few = [Answer(r.answer, 0.1, finish_reason="length" if i < 2 else "stop") for i, r in enumerate(rows)]
    assert suspicions([score_row(CONTRACT, r, a) for r, a in zip(rows, few, strict=True)]) == []


def test_a_rewriting_whose_right_answer_is_the_input_is_no_echo():
    """Guards against a warning where nothing had to be changed."""
    own, user = contract(Text, "rewriting", "exact_match"), "This sentence is fine as it stands."
    assert one(own, {"text": user}, {"text": user}, user).shares["echo_rate"] == 0.0
    assert one(own, {"text": "All is well."}, {"text": user}, user).shares["echo_rate"] == 1.0


class Timed(ProgramModel):
    """A program with the facts of a local model; remembers its prompts."""

    memory_mb = 123.0

    def answer(self, prompts):
        self.asked = [*getattr(self, "asked", []), *prompts]
        return [Answer(a.text, 0.5, 10, 5, first_token_s=0.2) for a in super().answer(prompts)]


def test_a_result_carries_time_memory_decoding_and_warnings(settings):
    """Guards against a table that mixes constrained and free decoding, or a warning that is lost on the way."""
    rows, model = ticket_rows(60), Timed("m", lambda text: json.dumps(gold(0)))
    found = evaluate(settings, CONTRACT, model, rows, set="dev", name="base", latency=True, constrained=True)
    assert (found.latency_p50_s, found.latency_p95_s, found.latency_p99_s, found.first_token_s) == (0.5, 0.5, 0.5, 0.2)
    assert (found.memory_mb, found.tokens_per_second, found.constrained) == (123.0, 10.0, True)
    assert {json.dumps(p.schema) for p in model.asked} == {json.dumps(CONTRACT.schema)}
    assert "collapse" in found.warnings[0] and found.calibration == {} and found.metrics["error_rate"].value == 0
    assert evaluate(settings, CONTRACT, model, rows, set="dev", name="majority").warnings == []
    assert model.asked[-1].schema is None and Result.model_validate_json(found.model_dump_json()) == found


def test_hosted_and_local_requests_have_their_price():
    """Guards against a larger model that looks free: tokens x price, or wait x hourly rate + hosting."""
    settings = Settings.model_validate(
        {"cost": {"gpu_hourly_rate": 3.6, "hosting_per_month": 10, "larger_price_per_1m_tokens": 5}}
    )
    result = Result(name="x", set="dev", latency_p50_s=0.5, prompt_tokens=900, completion_tokens=100)
    assert cost_per_1k(settings, result) == pytest.approx(0.5 + 0.01)
    assert cost_per_1k(settings, result, Endpoint()) == pytest.approx(5.0)
    assert cost_per_1k(settings, result, Endpoint(usd_per_1m_input=1, usd_per_1m_output=10)) == pytest.approx(1.9)


def test_slices_hold_only_rows_that_the_metric_speaks_of(settings):
    """Guards against a slice that looks bad because its rows have no expected violation at all."""
    rows = [make_row(f"m{i}", json.dumps({"label": "fraud" if i % 2 else "allowed"}), kind="canonical" if i % 2 else "boundary")
            for i in range(20)]  # fmt: skip
    model = ProgramModel("m", lambda text: '{"label": "fraud"}')
    found = evaluate(settings, SAFETY, model, rows, set="other", name="base").slices["kind"]
    assert list(found) == ["canonical"] and (found["canonical"].value, found["canonical"].n) == (1.0, 10)


# Comparisons of results.


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"set_hash": "b" * 64}, "different rows .aaaaaaaaaaaa and bbbbbbbbbbbb"),
        ({"set": "test"}, "tuned on dev and base on test"),
        ({"contract_hash": "old"}, "different contracts .* and old"),
        ({"reason": "no endpoint"}, "base on .* was not run .no endpoint"),
    ],
)
def test_results_of_other_sets_or_contracts_are_refused(fault, message):
    """Planted: predictions from another version of the set, of another set, under another contract, and none at all."""
    mine, other = result("tuned", guesses(0.9, 1)), result("base", guesses(0.5, 2), **fault)
    for refused in (
        lambda: compare_results(mine, other, CONTRACT, SETTINGS), lambda: seeds([mine, other]), lambda: gap_closed(mine, other, mine, CONTRACT, SETTINGS)
    ):  # fmt: skip
        with pytest.raises(SlmError, match=message):
            refused()
    old = [r.model_copy(update={"contract_hash": "old"}) for r in (mine, result("base", guesses(0.5, 2)))]
    with pytest.raises(SlmError, match="different contracts .old and old, now"):
        compare_results(*old, CONTRACT, SETTINGS)


def test_other_row_lists_are_refused_everywhere():
    """Planted: a run with a row limit against one without."""
    mine, fewer = result("tuned", guesses(0.9, 1)), result("base", guesses(0.5, 2)[:40])
    with pytest.raises(SlmError, match="same rows"):
        compare_results(mine, fewer, CONTRACT, SETTINGS)
    with pytest.raises(SlmError, match="same rows"):
        gap_closed(mine, fewer, mine, CONTRACT, SETTINGS)


def test_constrained_against_free_decoding_is_said():
    """Planted: a constrained model compared with an unconstrained one."""
    held, free = result("tuned", guesses(1.0, 1), constrained=True), result("base", guesses(0.3, 2))
    mixed = compare_results(held, free, CONTRACT, SETTINGS)
    assert mixed.mixed and mixed.verdict == "better (constrained against unconstrained)" and mixed.outcome == "better"
    assert compare_results(free, free, CONTRACT, SETTINGS).verdict == "no difference shown"


@pytest.mark.parametrize("metric", ["field_f1", "macro_f1"])
def test_the_gap_closed_is_a_ratio_with_an_interval(metric):
    """Guards against a share of a gap that is itself within noise, and against rows in another order."""
    own = contract(Ticket, "extraction", metric, label_field="topic", null_label="none")
    texts = {"tuned": guesses(0.7, 1), "base": guesses(0.3, 2), "larger": guesses(0.95, 3)}
    tuned, base, larger = (result(name, text, contract=own) for name, text in texts.items())
    found = gap_closed(tuned, base, larger, own, SETTINGS)
    t, b, g = (r.metrics[metric].value for r in (tuned, base, larger))
    assert found.value == near((t - b) / (g - b)) and found.low < found.value < found.high < 1.1
    turned = larger.model_copy(update={"scores": larger.scores[::-1]})
    assert gap_closed(tuned, base, turned, own, SETTINGS).value == near(found.value)
    assert gap_closed(tuned, base, result("larger", texts["base"], contract=own), own, SETTINGS) is None


# The judge.


def judge(choose):
    """A judge that sees both answers: `choose(first, second) -> 0, 1 or 2`, or a text."""

    def reply(text):
        if "ANSWER 1" not in text:
            return choose(text, "")
        first, second = text.split("ANSWER 1: ")[1].split("\nWhich")[0].split("\nANSWER 2: ")
        found = choose(first, second)
        return found if isinstance(found, str) else json.dumps({"better": found})

    return ProgramModel("judge", reply)


REWRITE = contract(Text, "rewriting", "rubric_score", brief={"goal": "Shorten."})


def rewrites(n, text):
    rows = [make_row(f"long text {i}", '{"text": "ok"}', id=f"r{i}") for i in range(n)]
    return rows, scores(REWRITE, rows, [json.dumps({"text": text(i)}) for i in range(n)])


def test_a_fair_judge_sees_both_orders_and_ties_count_half():
    """Guards against a preference taken from one order only."""
    rows, mine = rewrites(40, lambda i: "s" if i < 30 else "same")
    _, other = rewrites(40, lambda i: "looong" if i < 20 or i >= 36 else "same" if i >= 30 else "s")
    found = prefer(SETTINGS, REWRITE, rows, mine, other, judge(lambda a, b: 0 if len(a) == len(b) else 1 if len(a) < len(b) else 2))
    assert (len(found.wins), len(found.losses), len(found.ties)) == (24, 0, 16) and found.unread == []
    assert found.win_rate.value == near((24 + 8) / 40) and found.consistency.value == 1.0 and found.first_rate.value == 0.5
    assert found.sign_p < 0.001 and found.warnings == []


@pytest.mark.parametrize(("place", "name"), [(1, "first"), (2, "second")])
def test_a_judge_that_goes_by_the_order_is_named(place, name):
    """Planted: a judge that prefers the first answer, and one that prefers the second."""
    rows, mine = rewrites(20, lambda i: "a")
    found = prefer(SETTINGS, REWRITE, rows, mine, rewrites(20, lambda i: "b")[1], judge(lambda a, b: place))
    assert found.win_rate.value == 0.5 and found.consistency.value == 0.0 and len(found.ties) == 20
    assert f"position bias: judge prefers the answer shown {name}" in found.warnings[0] and "20 of 20" in found.warnings[0]


def test_replies_that_cannot_be_read_are_left_out_and_named():
    """Guards against a judge's prose that is counted as a verdict."""
    rows, mine = rewrites(10, lambda i: f"a{i}")
    _, other = rewrites(10, lambda i: "b")
    found = prefer(SETTINGS, REWRITE, rows, mine, other, judge(lambda a, b: "both are nice" if "a3" in a + b else 1 + ("a" not in a)))
    assert found.unread == ["r3"] and len(found.wins) == 9 and "1 of 10 rows" in found.warnings[0]


def test_rubric_notes_become_a_score_and_a_broken_answer_has_none():
    """Guards against a rubric that rates what no program can read, and against a judge that never answers in form."""
    rows, own = rewrites(4, lambda i: f"t{i}")
    own[3] = score_row(REWRITE, rows[3], Answer("prose", 0.1))
    note = judge(lambda text, _: "?" if "t2" in text else '{"fidelity": 5, "task": 4, "clarity": 3}')
    add_rubric(SETTINGS, REWRITE, rows, own, note)
    assert [s.shares.get("rubric_score") for s in own] == [0.75, 0.75, None, 0.0]
    found = measure(own, REWRITE, SETTINGS)["rubric_score"]
    assert (found.value, found.n) == (0.5, 3) and own[0].value == 0.75
    with pytest.raises(SlmError, match="no reply can be read"):
        add_rubric(SETTINGS, REWRITE, rows, own, judge(lambda text, _: "fine!"))


def test_a_rewriting_task_is_judged_when_a_judge_is_set(settings, monkeypatch):
    """Guards against a judge that is set in project.yaml and never asked."""
    asked = judge(lambda a, b: '{"fidelity": 5, "task": 5, "clarity": 5}' if not b else 1 if len(a) < len(b) else 2)
    monkeypatch.setattr("slm.evaluate.preference.judge_model", lambda settings: asked)
    own = settings.model_copy(update={"evaluate": settings.evaluate.model_copy(update={
        "judge": settings.evaluate.judge.model_copy(update={"url": "http://localhost:1", "model": "j"})})})  # fmt: skip
    own._root, rows = settings.root, rewrites(5, str)[0]
    short, long = (
        evaluate(own, REWRITE, ProgramModel(t, lambda text, t=t: json.dumps({"text": t})), rows, set="dev", name="base")
        for t in ("s", "looong")
    )
    assert short.metrics["rubric_score"].value == 1.0
    assert len(prefer(own, REWRITE, rows, short.scores, long.scores).wins) == 5
