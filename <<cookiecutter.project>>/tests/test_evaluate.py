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
    baselines,
    candidate,
    check_sets,
    detectable_difference,
    load_baselines,
    measure,
    paired,
    require_baselines,
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


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("id", "same id twice"),
        ("text", "same text twice"),
        ("group", "groups that stand in two"),
        ("gold", "break the contract"),
    ],
)
def test_faulty_evaluation_sets_are_refused(settings, fault, message):
    """Planted: a shared id, text or group, and a gold answer outside the contract."""
    rows = ticket_rows(30, "test")
    other = {
        "id": make_row("new text", json.dumps(gold(1)), id="dev-1", category="bug"),
        "text": make_row("Dev  message 1", json.dumps(gold(1)), category="bug"),
        "group": make_row("new text", json.dumps(gold(1)), category="bug", group="dev-1"),
        "gold": make_row("new text", '{"topic": "rain"}', category="bug"),
    }[fault]
    write_rows(settings.path("data/eval/test.jsonl"), [*rows, other])
    with pytest.raises(SlmError, match=message):
        check_sets(settings, CONTRACT)


def run_02(settings):
    sets = check_sets(settings, CONTRACT)
    registry.lock_sets(settings)
    found = run_baselines(settings, CONTRACT, {"dev": take(settings, sets["dev"])}, predict=predict, fewshot=fewshot)
    save_baselines(settings, CONTRACT, found)
    return found


def test_baselines_all_run_on_the_same_rows_or_say_why_not(settings):
    """Guards against a missing baseline that nobody notices: the larger model is a line with its reason."""
    found = {r.name: r for r in run_02(settings)}
    assert list(found) == list(baselines.NAMES)
    assert "model.larger" in found["larger"].reason and not found["larger"].ran
    assert len({tuple(s.row_id for s in r.scores) for r in found.values() if r.ran}) == 1
    assert found["rules"].metrics["field.topic"].value == 1.0 and found["rules"].metrics["field.urgent"].value == 0.75
    assert all(r.latency_p50_s is not None for r in found.values() if r.ran)


def test_majority_comes_from_the_seed_rows_and_keeps_the_contract(settings):
    """Guards against a majority class read off the evaluation set, or values that do not go together."""
    assert baselines.majority(baselines.seed_rows(settings), CONTRACT) == {
        "topic": "bill",
        "order": None,
        "urgent": False,
    }
    calls = [make_row(f"m{i}", json.dumps(v), category="x") for i, v in enumerate(
        [{"tool": "none", "arguments": {}}] * 2 + [{"tool": "send", "arguments": {"to": str(i)}} for i in range(3)])]  # fmt: skip
    assert CALLS.parse(json.dumps(baselines.majority(calls, CALLS))).error is None


def test_training_is_refused_until_02_was_run_on_these_sets(settings):
    """Planted: no baselines; then baselines of another row limit; then a golden row changed after the lock."""
    with pytest.raises(SlmError, match="not locked; run 02_baseline"):
        require_baselines(settings)
    registry.lock_sets(settings)
    with pytest.raises(SlmError, match="no baselines yet: run 02_baseline"):
        require_baselines(settings)
    run_02(settings)
    assert require_baselines(settings).name == "baselines.json"
    assert [r.name for r in load_baselines(settings, CONTRACT)] == list(baselines.NAMES)
    limited = settings.model_copy(update={"evaluate": settings.evaluate.model_copy(update={"limit": 8})})
    limited._root = settings.root
    with pytest.raises(SlmError, match="row limit"):
        require_baselines(limited)
    with pytest.raises(SlmError, match="another contract"):
        load_baselines(settings, CALLS)
    file = settings.path("data/eval/golden.jsonl")
    file.write_text(file.read_text().replace("golden message 3", "golden message three"))
    with pytest.raises(SlmError, match="golden.jsonl: changed since it was locked"):
        require_baselines(settings)


def test_a_torn_baselines_file_is_named(settings):
    """Planted: a baselines.json that was cut off."""
    run_02(settings)
    file = require_baselines(settings)
    file.write_text(file.read_text()[:500])
    with pytest.raises(SlmError, match="not a baselines file; delete it"):
        require_baselines(settings)


def test_known_results_are_not_asked_again_but_other_rows_are(settings):
    """Guards against 06 comparing on stale rows, and against paying twice for the same answers."""
    known, sets = run_02(settings), check_sets(settings, CONTRACT)
    again = run_baselines(settings, CONTRACT, {"dev": sets["dev"], "golden": sets["golden"]}, predict=predict, fewshot=fewshot,
                          known=known)  # fmt: skip
    assert again[0] is known[0] and [r.set for r in again].count("golden") == 5
    fewer = run_baselines(settings, CONTRACT, {"dev": sets["dev"][:10]}, predict=predict, fewshot=fewshot, known=known)
    assert len(fewer[0].scores) == 10


def test_the_better_prompt_precedes_the_question_and_shots_cover_the_labels(settings):
    """Guards against a few-shot prompt whose system message is doubled or whose examples are all of one class."""
    from slm.evaluate.scorers import prompt_messages

    shots = baselines.choose_shots(baselines.seed_rows(settings), CONTRACT, 3)
    assert {r.meta.category for r in shots} == set(TOPICS)
    messages = prompt_messages(CONTRACT, ticket_rows(1)[0], fewshot(CONTRACT, shots))
    assert [m["role"] for m in messages].count("system") == 1 and messages[-1]["content"] == "dev message 0"
    assert (
        prompt_messages(CONTRACT, ticket_rows(1)[0], fewshot(CONTRACT, shots)[1:])[0]["content"]
        == CONTRACT.system_prompt
    )


def test_the_limit_spreads_over_the_file(settings):
    """Guards against a smoke run on the first class only."""
    limited = settings.model_copy(update={"evaluate": settings.evaluate.model_copy(update={"limit": 6})})
    assert [r.id for r in take(limited, ticket_rows(60))] == [f"dev-{i}" for i in range(0, 60, 10)]


def test_test_is_opened_only_for_the_final_test_and_every_look_is_counted(settings, capsys):
    """Guards against quiet tuning on the test set."""
    run_02(settings)
    assert "test" not in candidate.open_sets(settings, CONTRACT) and registry.read(settings, "looks") == []
    final = settings.model_copy(update={"evaluate": settings.evaluate.model_copy(update={"final_test": True})})
    final._root = settings.root
    candidate.open_sets(final, CONTRACT)
    assert "test" in candidate.open_sets(final, CONTRACT) and len(registry.read(settings, "looks")) == 2
    assert "no longer an unseen set" in capsys.readouterr().out


def test_an_unknown_metric_or_baseline_is_named(settings):
    """Guards against a typo that would silently score zero."""
    with pytest.raises(SlmError, match="primary_metric 'f1'"):
        one(
            Contract(name="x", task_type="extraction", output=Ticket, system_prompt="x", primary_metric="f1", target=1),
            gold(1),
            "{}",
        )
    with pytest.raises(SlmError, match="no such baseline"):
        baselines.run_baseline(settings, CONTRACT, "rag", ticket_rows(3), "dev", predict=predict, fewshot=fewshot)


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
