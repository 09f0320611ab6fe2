"""Scorers, metrics, comparisons, baselines and release gates, each with the fault it must catch."""

import json
import random
from typing import Literal

import numpy as np
import pytest
from pydantic import BaseModel, ConfigDict

from slm import registry
from slm.contract import Contract
from slm.errors import SlmError
from slm.evaluate import (
    candidate,
    check_sets,
    detectable_difference,
    measure,
    paired,
    run_baselines,
    save_baselines,
    score_row,
    take,
)  # fmt: skip
from slm.evaluate.metrics import confusion, interval, table_statistic
from slm.models import Answer
from slm.models.program import ProgramModel
from slm.rows import make_row, write_rows
from slm.settings import Settings


class Ticket(BaseModel):
    model_config = ConfigDict(extra="forbid")
    topic: Literal["bill", "bug", "none"]
    order: str | None
    urgent: bool


class Call(BaseModel):
    model_config = ConfigDict(extra="forbid")
    tool: Literal["send", "timer", "none"]
    arguments: dict[str, str | int]


CONTRACT = Contract(
    name="tickets", task_type="extraction", output=Ticket, system_prompt="Sort the ticket.", primary_metric="field_f1",
    target=0.9, critical=("topic",), label_field="topic", null_label="none",
)  # fmt: skip
CALLS = Contract(
    name="calls", task_type="tool_calling", output=Call, system_prompt="One call.", primary_metric="exact_match",
    target=0.9, critical=("tool",), label_field="tool", null_label="none", unsafe_labels=("send",),
)  # fmt: skip
TOPICS = ("bill", "bug", "none")


def gold(i: int) -> dict:
    return {"topic": TOPICS[i * 7 % 3 if i % 5 else 0], "order": f"A-{i}" if i % 3 == 0 else None, "urgent": i % 4 == 0}


def ticket_rows(n: int, name: str = "dev"):
    return [
        make_row(f"{name} message {i}", json.dumps(gold(i)), id=f"{name}-{i}", category=gold(i)["topic"], group=f"{name}-{i}",
                 kind=("canonical", "boundary", "near_miss")[i % 3], difficulty=("easy", "hard")[i % 2])
        for i in range(n)
    ]  # fmt: skip


def predict(text: str) -> dict:
    return gold(int(text.split()[-1])) | {"urgent": False}


def fewshot(contract, rows):
    return [
        {"role": "system", "content": "Better."},
        *({"role": m.role, "content": m.content} for r in rows for m in r.messages),
    ]


def double(name: str, right: float, seed: int = 1):
    """A model that knows the answer of a share of the rows."""
    rng = random.Random(seed)

    def answer(text):
        value = gold(int(text.split()[-1]))
        return json.dumps(
            value if rng.random() < right else value | {"topic": "bug" if value["topic"] != "bug" else "bill"}
        )

    return ProgramModel(name, answer, f"{name}{right}{seed}")


@pytest.fixture
def settings(tmp_path, monkeypatch):
    made = Settings.model_validate({"evaluate": {"resamples": 300, "latency_requests": 2, "fewshot": 2}})
    made._root = tmp_path
    for name, n in (("dev", 60), ("test", 30), ("adversarial", 30), ("golden", 30)):
        write_rows(tmp_path / f"data/eval/{name}.jsonl", ticket_rows(n, name))
    write_rows(tmp_path / "data/raw/seed.jsonl", ticket_rows(20, "seed"))
    monkeypatch.setattr("slm.models.student", lambda settings, adapter=None: double("tiny", 0.2))
    return made


def scores(contract, rows, texts):
    return [score_row(contract, r, Answer(t, 0.1)) for r, t in zip(rows, texts, strict=True)]


def one(contract, answer, text):
    row = make_row("q", json.dumps(answer), category="x")
    return score_row(contract, row, Answer(text, 0.1))


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
    found = measure([extra, wrong], CALLS, Settings())
    assert found["argument_f1"].value == pytest.approx(0.4) and found["tool_name_accuracy"].value == 0.5


def test_an_unasked_unsafe_call_is_counted_even_inside_prose():
    """Guards against a runtime that carries out a call which the strict parser did not see."""
    text = 'Of course: {"tool": "send", "arguments": {}}'
    found = measure([one(CALLS, {"tool": "none", "arguments": {}}, text)], CALLS, Settings())
    assert found["unsafe_tool_call_rate"].value == 1.0 and found["json_parse_rate"].value == 0.0


def test_required_arguments_are_those_the_contract_demands():
    """Guards against counting an optional argument into required_argument_accuracy."""

    class Arguments(BaseModel):
        model_config = ConfigDict(extra="forbid")
        text: str
        date: str = None

    class Reminder(BaseModel):
        model_config = ConfigDict(extra="forbid")
        tool: Literal["remind", "none"]
        arguments: Arguments

    contract = Contract(
        name="r", task_type="tool_calling", output=Reminder, system_prompt="x", primary_metric="exact_match", target=1,
        label_field="tool",
    )  # fmt: skip
    score = one(contract, {"tool": "remind", "arguments": {"text": "a", "date": "b"}},
                '{"tool": "remind", "arguments": {"text": "a"}}')  # fmt: skip
    assert score.required == ["arguments.text"]
    assert measure([score], contract, Settings())["required_argument_accuracy"].value == 1.0


def test_a_row_whose_own_answer_breaks_the_contract_is_an_error():
    """Guards against scoring models on a broken gold label."""
    with pytest.raises(SlmError, match="row .*breaks the contract"):
        one(CONTRACT, {"topic": "bill"}, "{}")


def test_wilson_matches_statsmodels_and_certainty_is_never_claimed():
    """Guards against a zero-width interval when all rows agree."""
    metric = interval([1.0] * 8 + [0.0] * 2, 300, 0.95)
    assert (metric.low, metric.high) == (pytest.approx(0.490, abs=1e-3), pytest.approx(0.943, abs=1e-3))
    assert interval([1.0] * 20, 300, 0.95).low < 0.9 and interval([0.5] * 20, 300, 0.95).low < 0.5
    assert interval([], 300, 0.95).n == 0


def test_the_bootstrap_covers_and_is_seeded():
    """Guards against intervals that move from run to run."""
    values = list(np.random.default_rng(0).beta(5, 2, 200))
    first, second = interval(values, 500, 0.95), interval(values, 500, 0.95)
    assert first == second and first.low < np.mean(values) < first.high and first.high - first.low < 0.1


def test_macro_f1_equals_scikit_learn():
    """Guards against an own formula that drifts from the reference."""
    from sklearn.metrics import f1_score

    rng = random.Random(0)
    want, got = [rng.choice("abc") for _ in range(200)], [rng.choice("abcd") for _ in range(200)]
    mine = table_statistic(want, got)(np.arange(200)[None])[0]
    assert mine == pytest.approx(f1_score(want, got, labels=list("abc"), average="macro", zero_division=0))


def test_always_majority_has_a_poor_macro_f1():
    """Planted: a model that always says the commonest class; accuracy alone would flatter it."""
    rows = ticket_rows(60)
    found = measure(scores(CONTRACT, rows, [json.dumps(gold(0))] * 60), CONTRACT, Settings())
    assert found["macro_f1"].value < found["accuracy"].value and found["macro_f1"].value < 0.4


def test_shuffled_labels_fall_to_chance():
    """Planted: right answers in the wrong order; a scorer that matched by content and not by row would not notice."""
    rows = ticket_rows(60)
    texts = [r.answer for r in rows]
    assert measure(scores(CONTRACT, rows, texts), CONTRACT, Settings())["exact_match"].value == 1.0
    random.Random(3).shuffle(texts)
    assert measure(scores(CONTRACT, rows, texts), CONTRACT, Settings())["exact_match"].value < 0.4


def test_confusion_matrix_counts_every_row_and_names_the_unreadable():
    """Guards against unreadable answers that vanish from the matrix."""
    rows = ticket_rows(9)
    found = confusion(scores(CONTRACT, rows, [r.answer for r in rows[:8]] + ["no idea"]), CONTRACT)
    assert np.sum(found["counts"]) == 9 and found["labels"][-1] == "(unreadable)"


def test_improvement_within_noise_is_not_called_better(settings):
    """Planted: two models of the same quality that err on other rows."""
    rows = ticket_rows(60)
    a, b = (
        candidate.evaluate(settings, CONTRACT, double("m", 0.8, s), rows, set="dev", name="m").scores for s in (1, 2)
    )
    assert paired(a, b, CONTRACT, settings).verdict == "no difference shown"


def test_a_real_gain_is_shown_and_few_rows_show_nothing(settings):
    """Guards against a verdict from a handful of rows."""
    rows = ticket_rows(60)
    good, bad = [r.answer for r in rows], [json.dumps(gold(0))] * 60
    found = paired(scores(CONTRACT, rows, good), scores(CONTRACT, rows, bad), CONTRACT, settings)
    assert found.verdict == "better" and found.difference.low > 0 and found.mcnemar_p < 0.001 and found.broken == []
    assert found.candidate - found.baseline == pytest.approx(found.difference.value)
    few = paired(scores(CONTRACT, rows[:8], good[:8]), scores(CONTRACT, rows[:8], bad[:8]), CONTRACT, settings)
    assert few.difference.low > 0 and few.verdict == "no difference shown"


def test_other_rows_or_changed_answers_are_refused(settings):
    """Planted: a baseline that was run on other rows, and one whose gold answer was edited since."""
    rows = ticket_rows(40)
    mine = scores(CONTRACT, rows, [r.answer for r in rows])
    with pytest.raises(SlmError, match="same rows.*dev-39"):
        paired(mine, mine[:39], CONTRACT, settings)
    with pytest.raises(SlmError, match="same rows"):
        paired(mine, [*mine[:39], mine[0]], CONTRACT, settings)
    changed = [*mine[:39], mine[39].model_copy(update={"expected": gold(1)})]
    with pytest.raises(SlmError, match="dev-39: its expected answer changed"):
        paired(mine, changed, CONTRACT, settings)


def test_detectable_difference_halves_with_four_times_the_rows():
    """Guards against a wrong sample-size formula: 0.4 spread on 120 rows shows about 0.10."""
    assert detectable_difference(120) == pytest.approx(2.8016 * 0.4 / 120**0.5, rel=1e-3)
    assert detectable_difference(480) == pytest.approx(detectable_difference(120) / 2)


def run_02(settings):
    sets = check_sets(settings, CONTRACT)
    registry.lock_sets(settings)
    found = run_baselines(settings, CONTRACT, {"dev": take(settings, sets["dev"])}, predict=predict, fewshot=fewshot)
    save_baselines(settings, CONTRACT, found)
    return found


def test_an_unknown_metric_is_named():
    """Guards against a typo that would silently score zero."""
    with pytest.raises(SlmError, match="primary_metric 'f1'"):
        one(
            Contract(name="x", task_type="extraction", output=Ticket, system_prompt="x", primary_metric="f1", target=1),
            gold(1),
            "{}",
        )


def test_hosted_and_local_requests_have_their_price():
    """Guards against a larger model that looks free: tokens x price, or wait x hourly rate + hosting."""
    from slm.evaluate.metrics import Result, cost_per_1k
    from slm.settings import Endpoint

    settings = Settings.model_validate(
        {"cost": {"gpu_hourly_rate": 3.6, "hosting_per_month": 10, "larger_price_per_1m_tokens": 5}}
    )
    result = Result(name="x", set="dev", latency_p50_s=0.5, prompt_tokens=900, completion_tokens=100)
    assert cost_per_1k(settings, result) == pytest.approx(0.5 + 0.01)
    assert cost_per_1k(settings, result, Endpoint()) == pytest.approx(5.0)
    assert cost_per_1k(settings, result, Endpoint(usd_per_1m_input=1, usd_per_1m_output=10)) == pytest.approx(1.9)
