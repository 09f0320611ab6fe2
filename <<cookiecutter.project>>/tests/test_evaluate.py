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
