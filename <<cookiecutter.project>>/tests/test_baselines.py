"""Evaluation sets, baselines, the fine-tuned model's results: each with the fault it must catch."""
# ruff: noqa: F811

import json
from dataclasses import replace
from typing import Literal

import pytest
from pydantic import BaseModel, ConfigDict, RootModel
from tickets import CALLS, CONTRACT, TOPICS, double, fewshot, gold, predict, run_02, settings, ticket_rows  # noqa: F401

from slm import registry
from slm.errors import SlmError
from slm.evaluate import (
    baselines,
    candidate,
    check_sets,
    classical,
    load_baselines,
    require_baselines,
    retrieve,
    run_baseline,
    run_baselines,
    take,
)  # fmt: skip
from slm.models import Answer, Prompt
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


def settings_with(settings, **sections):
    """The same project with some settings changed."""
    changed = {name: getattr(settings, name).model_copy(update=values) for name, values in sections.items()}
    other = settings.model_copy(update=changed)
    other._root = settings.root
    return other


class Recorder:
    """A model that keeps what it was asked and gives one answer."""

    name, memory_mb = "recorder", 12.0

    def __init__(self, text: str = "{}", refuses: bool = False):
        self.fingerprint, self.asked, self._text, self._refuses = f"recorder {text}", [], text, refuses

    def answer(self, prompts):
        self.asked += prompts
        if self._refuses and any(prompt.schema for prompt in prompts):
            raise SlmError("the schema cannot be turned into a grammar.")
        return [Answer(self._text, 0.1) for _ in prompts]


def colour_rows(n: int):
    """Messages whose first word gives the topic and whose last word whether it is urgent."""
    words = {"bill": "invoice", "bug": "crash", "none": "hello"}
    return [
        make_row(f"{words[t]} about item {i} {'now' if i % 2 else 'later'}", json.dumps({"topic": t, "order": None, "urgent": bool(i % 2)}),
                 id=f"c{i}", category=t)
        for i, t in enumerate((TOPICS * n)[:n])
    ]  # fmt: skip


def test_the_classical_model_learns_each_closed_field():
    """Guards against a classical baseline that is the majority class in disguise."""
    model = classical.fit(colour_rows(60), CONTRACT, baselines.majority)
    texts = ["crash about item 900 now", "hello about item 901 later", "invoice about item 902 now"]
    given = [json.loads(a.text) for a in model.answer([Prompt([{"role": "user", "content": t}]) for t in texts])]
    assert [(g["topic"], g["urgent"], g["order"]) for g in given] == [("bug", True, None), ("none", False, None), ("bill", True, None)]
    assert classical.closed_fields(CONTRACT.schema) == ["topic", "urgent"]


def test_a_classical_answer_always_keeps_the_contract():
    """Planted: arguments that belong to one tool only; the usual arguments of the other tool must not be mixed in."""

    class Send(BaseModel):
        model_config = ConfigDict(extra="forbid")
        tool: Literal["send"]
        arguments: dict[Literal["to"], str]

    class Timer(BaseModel):
        model_config = ConfigDict(extra="forbid")
        tool: Literal["timer"]
        arguments: dict[Literal["minutes"], int]

    class Either(RootModel[Send | Timer]):
        pass

    contract = replace(CALLS, output=Either, unsafe_labels=(), null_label=None)
    calls = {"write to Ann": {"tool": "send", "arguments": {"to": "Ann"}}, "wake me": {"tool": "timer", "arguments": {"minutes": 5}}}
    rows = [make_row(f"{t} {i}", json.dumps(v), category=v["tool"]) for i in range(6) for t, v in calls.items()]
    model = classical.fit(rows, contract, baselines.majority)
    for text, call in calls.items():
        assert json.loads(model.answer([Prompt([{"role": "user", "content": f"{text} please"}])])[0].text) == call


def test_without_a_closed_field_the_classical_model_is_a_line_with_its_reason(settings):
    """Guards against a classifier of free text, and against a baseline that vanishes from the table."""

    class Text(BaseModel):
        text: str

    contract = replace(CONTRACT, output=Text, task_type="rewriting", label_field=None, null_label=None, critical=("text",))
    rows = [make_row(f"row {i}", json.dumps({"text": "x"}), category="x") for i in range(4)]
    write_rows(settings.path("data/raw/seed.jsonl"), rows)
    found = run_baseline(settings, contract, "classical", rows, "dev", **HOW)
    assert not found.ran and "no label, choice or yes/no field" in found.reason


def test_in_06_the_classical_model_is_fitted_on_the_run_s_training_rows(settings):
    """Planted: a training split that was made again since the run was trained; its rows are not what the run saw."""
    rows, file = colour_rows(40), settings.path("data/accepted/train.jsonl")
    write_rows(file, rows)
    registry.append(settings, "datasets", {"version": "v1", "split": {"files": {"train": registry.file_hash(file)[:16]}}})
    registry.append(settings, "runs", {"stage": "train", "status": "completed", "run_id": "dev", "parents": {"dataset": "v1"}})
    sets = {"dev": check_sets(settings, CONTRACT)["dev"]}
    by_name = {r.name: r for r in run_baselines(settings, CONTRACT, sets, **HOW, train=True)}
    assert by_name["classical"].model.endswith("on 40 rows")
    assert run_baseline(settings, CONTRACT, "classical", sets["dev"], "dev", **HOW).model.endswith("on 20 rows")
    write_rows(file, rows[:30])
    found = run_baseline(settings, CONTRACT, "classical", sets["dev"], "dev", **HOW, train=True)
    assert not found.ran and "not what run dev was trained on" in found.reason


@pytest.mark.parametrize("name", ["dev", "test"])
def test_an_evaluation_row_in_the_few_shot_prompt_is_refused(settings, name):
    """Planted: a prompt that shows the model a row of an evaluation set, seed rows or not."""
    shown = check_sets(settings, CONTRACT)[name][3]
    cheat = {"predict": predict, "fewshot": lambda contract, rows: fewshot(contract, [*rows, shown])}
    with pytest.raises(SlmError, match=f"{name}.jsonl row {shown.id}"):
        run_baseline(settings, CONTRACT, "prompted_base", ticket_rows(3), "dev", **cheat)


def test_few_shot_examples_are_seed_rows(settings, monkeypatch):
    """Guards against examples taken from anywhere else, and against a base model that gets them too."""
    model = Recorder()
    monkeypatch.setattr("slm.models.student", lambda settings, adapter=None: model)
    seeds, rows = {r.user for r in baselines.seed_rows(settings)}, ticket_rows(3)
    for name, count in (("base", 0), ("prompted_base", 2), ("prompted_constrained", 2)):
        model.asked.clear()
        run_baseline(settings, CONTRACT, name, rows, "dev", **HOW, latency=False)
        for prompt in model.asked:
            *shots, last = [m["content"] for m in prompt.messages if m["role"] == "user"]
            assert len(shots) == count and set(shots) <= seeds and last in {r.user for r in rows}


def test_the_constrained_variants_are_asked_with_the_schema_on_dev_alone(settings, monkeypatch):
    """Guards against a "constrained" column that was decoded freely, and against one that is silently missing."""
    model, sets = Recorder(json.dumps(gold(0))), {"dev": ticket_rows(4), "golden": ticket_rows(4, "golden")}
    monkeypatch.setattr("slm.models.student", lambda settings, adapter=None: model)
    found = [r for r in run_baselines(settings, CONTRACT, sets, **HOW) if r.name == "prompted_constrained"]
    found += [r for r in candidate.run_candidate(settings, CONTRACT, model, sets) if r.name == candidate.CONSTRAINED]
    assert [(r.set, r.constrained, r.ran) for r in found] == [("dev", True, True), ("golden", False, False)] * 2
    assert all("dev and test" in r.reason for r in found if r.set == "golden")
    assert {json.dumps(p.schema) for p in model.asked} == {"null", json.dumps(CONTRACT.schema)}
    off = settings_with(settings, evaluate={"constrained": False})
    assert "is off" in run_baseline(off, CONTRACT, "prompted_constrained", sets["dev"], "dev", **HOW).reason


def test_a_schema_that_cannot_be_decoded_costs_the_constrained_lines_only(settings, monkeypatch):
    """Planted: a runtime that refuses the schema."""
    model, sets = Recorder(refuses=True), {"dev": ticket_rows(4)}
    monkeypatch.setattr("slm.models.student", lambda settings, adapter=None: model)
    found = {r.name: r for r in run_baselines(settings, CONTRACT, sets, **HOW)}
    found |= {r.name: r for r in candidate.run_candidate(settings, CONTRACT, model, sets)}
    assert found["prompted_base"].ran and found["fine_tuned"].ran
    assert all("grammar" in found[name].reason for name in ("prompted_constrained", "fine_tuned_constrained"))


def test_retrieval_puts_the_nearest_passages_before_the_question(settings, monkeypatch):
    """Guards against a RAG baseline that retrieves nothing, or that shows the examples documents and the question none."""
    needed, model = settings_with(settings, task={"needs_knowledge": True}, evaluate={"retrieve": 1}), Recorder()
    monkeypatch.setattr("slm.models.student", lambda settings, adapter=None: model)
    with pytest.raises(SlmError, match="data/raw.*no .md or .txt.*needs_knowledge: false"):
        run_baseline(needed, CONTRACT, "rag", ticket_rows(3), "dev", **HOW)
    settings.path("data/raw/book.md").write_text("# Refunds\nWithin 30 days.\n\n# Messages\nA dev message is short.\n")
    found = run_baseline(needed, CONTRACT, "rag", ticket_rows(3), "dev", **HOW)
    assert found.ran and found.memory_mb == 12.0 and "with retrieval" in found.model
    *_, last = model.asked[0].messages
    assert last["content"].startswith("Documents:\n\n[book.md 2]\n# Messages") and last["content"].endswith("dev message 0")
    assert "30 days" not in last["content"] and "Documents" not in model.asked[0].messages[1]["content"]
    assert "needs no documents" in run_baseline(settings, CONTRACT, "rag", ticket_rows(3), "dev", **HOW).reason


def test_a_changed_document_is_asked_again():
    """Guards against answers from the cache that rest on an older document, and long lines in one passage."""
    one, two = (retrieve.RetrievingModel(Recorder(), [("a.md 1", text)], 1) for text in ("old", "new"))
    assert one.fingerprint != two.fingerprint
    assert one.find("nothing shared") == [] and one.find("an OLD word") == [("a.md 1", "old")]


def test_long_documents_are_cut_into_passages(settings):
    """Planted: a document of one endless line; whole, it would fill any context."""
    settings.path("data/raw/long.txt").write_text("word " * 2000)
    parts = retrieve.read_passages(settings)
    assert len(parts) >= 8 and max(len(text.split()) for _, text in parts) < 2 * 200 and parts[1][0] == "long.txt 2"


def test_exported_files_join_the_scores_and_an_earlier_export_s_leave(settings):
    """Guards against a table of all models with files that are not there any more."""
    run_02(settings)
    sets = candidate.open_sets(settings, CONTRACT)
    own = candidate.run_candidate(settings, CONTRACT, double("tuned", 0.9), sets)
    files = [
        candidate.evaluate(settings, CONTRACT, double(name, 0.9), sets["dev"], set="dev", name=name, latency=True)
        for name in ("f16", "q8_0", "q4_k_m")
    ]
    candidate.add_files(settings, files[:2])
    found = candidate.add_files(settings, files[1:])
    assert [r.name for r in found] == [r.name for r in own] + ["q8_0", "q4_k_m"]
    assert candidate.load_candidate(settings, "dev") == found and found[-1].latency_p50_s is not None
    rows = candidate.scored_sets(settings, found)
    assert {name: [r.id for r in part] for name, part in rows.items()} == {name: [r.id for r in part] for name, part in sets.items()}
    assert registry.read(settings, "looks") == []


def test_an_unknown_baseline_is_named(settings):
    """Guards against a typo that runs nothing."""
    with pytest.raises(SlmError, match="no such baseline; choose one of majority, rules, classical"):
        run_baseline(settings, CONTRACT, "larger_model", ticket_rows(3), "dev", **HOW)


def test_an_edited_rule_is_run_again_in_06(settings):
    """Planted: rules mended after 02; the old score would make the fine-tune look better."""
    known, sets = run_02(settings), {"dev": check_sets(settings, CONTRACT)["dev"]}
    better = {"predict": lambda text: gold(int(text.split()[-1])), "fewshot": fewshot}
    rules = run_baselines(settings, CONTRACT, sets, known=known, **better)[1]
    assert rules.metrics["exact_match"].value == 1.0 > known[1].metrics["exact_match"].value


def test_a_relocked_set_is_asked_again(settings):
    """Planted: a golden answer mended and locked again, ids unchanged; scores of the old rows must not be reused."""
    sets = {"golden": check_sets(settings, CONTRACT)["golden"]}
    known = run_baselines(settings, CONTRACT, sets, **HOW)
    file = settings.path("data/eval/golden.jsonl")
    file.write_text(file.read_text().replace("golden message 3", "golden message 303", 1))
    sets = {"golden": check_sets(settings, CONTRACT)["golden"]}
    again = {r.name: r for r in run_baselines(settings, CONTRACT, sets, known=known, **HOW)}
    assert again["base"].set_hash == registry.file_hash(file) and again["base"] not in known
