"""Evaluation sets, baselines, the fine-tuned model's results: each with the fault it must catch."""
# ruff: noqa: F811

import json

import pytest
from test_evaluate import CALLS, CONTRACT, TOPICS, double, fewshot, gold, predict, run_02, settings, ticket_rows  # noqa: F401

from slm import registry
from slm.errors import SlmError
from slm.evaluate import (
    baselines,
    candidate,
    check_sets,
    load_baselines,
    require_baselines,
    run_baselines,
    take,
)  # fmt: skip
from slm.rows import make_row, write_rows

HOW = {"predict": predict, "fewshot": fewshot}


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
    base = baselines.NAMES.index("base")
    assert again[base] is known[base] and [r.set for r in again].count("golden") == len(baselines.NAMES)
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
