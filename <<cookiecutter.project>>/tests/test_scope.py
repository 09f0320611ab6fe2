"""01: the decision, the shortlist, and the written task."""

import json
from pathlib import Path
from typing import Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field

from slm import registry
from slm.contract import Contract
from slm.errors import SlmError
from slm.evaluate.baselines import save_baselines
from slm.evaluate.metrics import Metric, Result
from slm.rows import make_row, write_rows
from slm.scope import decide, longest_row, require, shortlist, task_text, write_spec
from slm.scope.decide import TREE, facts
from slm.scope.shortlist import BASES, SIZES, size_verdict
from slm.scope.spec import BRIEF
from slm.settings import Settings, load_settings

ROOT = Path(__file__).resolve().parents[1]


class Ticket(BaseModel):
    model_config = ConfigDict(extra="forbid")
    label: Literal["a", "b", "none"] = Field(description="What it is about.")
    number: str | None = None


def make_contract(**changes) -> Contract:
    brief = {name: f"Text of {name}." for name in BRIEF}
    facts = {
        "name": "toy", "task_type": "extraction", "output": Ticket, "system_prompt": "Sort it.", "primary_metric": "field_f1",
        "target": 0.9, "critical": ("label",), "label_field": "label", "null_label": "none", "brief": brief,
    }  # fmt: skip
    return Contract(**{**facts, **changes})


def make_settings(root, rows: int = 60, **sections) -> Settings:
    settings = Settings.model_validate({"model": {"base": "tiny"}, **sections})
    settings._root = Path(root)
    answer = '{"label":"a","number":null}'
    write_rows(settings.path("data/raw/seed.jsonl"), [make_row(f"message {n}", answer, category="a") for n in range(rows)])
    return settings


@pytest.mark.parametrize(
    ("rows", "task", "choice"),
    [
        (60, {}, "fine_tuning"),
        (49, {}, "prompting"),
        (60, {"changes_often": True}, "prompting"),
        (60, {"flexible_style": True}, "prompting"),
        (60, {"requests_per_month": 200}, "prompting"),
        (60, {"needs_knowledge": True}, "rag"),
        (20, {"must_cite": True, "changes_often": True}, "rag"),
        (60, {"teacher_is_good": True}, "distillation"),
    ],
)
def test_the_decision_follows_the_tree(tmp_path, rows, task, choice):
    """Guards against advising a fine-tune where prompting or retrieval comes first."""
    assert decide(make_settings(tmp_path, rows, task=task), make_contract()).choice == choice


def test_what_is_not_measured_yet_stays_open(tmp_path):
    """Guards against a decision that passes a guess off as a finding."""
    decision = decide(make_settings(tmp_path), make_contract())
    answers = {line["sign"]: line["answer"] for line in decision.signs}
    assert answers["a good prompt alone reaches the target"] == "open"
    assert answers["the format is strict"] == "yes" and answers["the task changes often"] == "no"


@pytest.mark.parametrize(("score", "choice"), [(0.93, "prompting"), (0.4, "fine_tuning")])
def test_a_prompt_that_reaches_the_target_ends_the_matter(tmp_path, score, choice):
    """Guards against training although 02 has shown that a good prompt is enough."""
    settings, contract = make_settings(tmp_path), make_contract()
    for name in registry.SETS:
        write_rows(settings.path(f"data/eval/{name}.jsonl"), [make_row(name, '{"label":"a","number":null}', category="a")])
    registry.lock_sets(settings)
    metrics = {"field_f1": Metric(value=score, low=0.3, high=0.95, n=120)}
    save_baselines(settings, contract, [Result(name="prompted_base", set="dev", metrics=metrics)])
    assert decide(settings, contract).choice == choice


def test_every_sign_of_the_tree_has_a_fact(tmp_path):
    """Guards against a sign that no answer can ever decide."""
    known = facts(make_settings(tmp_path), make_contract())
    assert {sign.fact for lines in TREE.values() for sign in lines} <= known.keys()
    assert sum(len(lines) for lines in TREE.values()) >= 20


def test_preference_optimisation_is_advised_after_sft_only(tmp_path):
    """Guards against skipping SFT because pairs exist."""
    decision = decide(make_settings(tmp_path, task={"preference_data": True}), make_contract())
    assert decision.choice == "fine_tuning" and "preference" in decision.advice[-1]


def test_the_decision_is_saved_with_its_reasons(tmp_path):
    """Guards against a decision that nobody can read later."""
    settings = make_settings(tmp_path)
    decide(settings, make_contract()).save(settings)
    assert json.loads((settings.run_dir / "decision.json").read_text())["choice"] == "fine_tuning"
    assert "task.changes_often" in (settings.run_dir / "decision.md").read_text()


def test_the_size_rule_is_that_of_the_task_type():
    """Guards against a shortlist that calls a 135M model big enough for extraction."""
    assert size_verdict("extraction", 0.135) == "below 1B-4B"
    assert size_verdict("extraction", 4.0) == "fits 1B-4B"
    assert size_verdict("classification", 8.2) == "above 0.5B-3B"
    assert size_verdict("qa", None) == "unknown 3B-9B"
    assert SIZES["review"][:2] == (4, 14)


def test_the_shortlist_starts_with_the_chosen_base(tmp_path):
    """Guards against a list that hides the base in force, its licence or its context."""
    settings = make_settings(tmp_path, model={"base": "Qwen/Qwen3-1.7B"})
    table = shortlist(settings, make_contract())
    assert table.iloc[0]["model"] == "Qwen/Qwen3-1.7B" and table.iloc[0]["try"] == "1"
    assert len(table) == len(BASES) and set(table["try"]) == {"", "1", "2", "3"}
    gated = table[table["model"].str.startswith("meta-llama")].iloc[0]
    assert gated["terms"] == "own terms: read them first" and gated["try"] == ""


def test_the_longest_row_is_counted_in_the_bases_tokens(tmp_path):
    """Guards against rows that are cut in training because nobody measured them."""
    settings = make_settings(tmp_path, train={"max_seq_length": 40})
    long = make_row("word " * 60, '{"label":"a","number":null}', category="a")
    write_rows(settings.path("data/eval/dev.jsonl"), [long])
    longest = longest_row(settings, make_contract())
    assert longest["row"] == long.id and longest["file"] == "data/eval/dev.jsonl"
    assert 60 < longest["tokens"] < longest["most"]
    assert shortlist(settings, make_contract(), longest).iloc[0]["longest row"].startswith("TOO LONG")


@pytest.mark.parametrize(
    ("contract", "word"),
    [
        (None, "no contract"),
        (make_contract(brief={}), "goal, inputs"),
        (make_contract(brief={**make_contract().brief, "inputs": " "}), "inputs"),
        (make_contract(critical=("labels",)), "labels"),
    ],
)
def test_it_does_not_go_on_without_a_whole_contract(tmp_path, contract, word):
    """Guards against building on a task that nobody wrote down."""
    with pytest.raises(SlmError, match=word):
        require(make_settings(tmp_path), contract)


@pytest.mark.parametrize("task", [{"high_stakes": True}, {"domain": "medical notes"}, {"domain": "Employment law"}])
def test_a_high_stakes_domain_demands_a_named_expert(tmp_path, task):
    """Guards against a medical or legal fine-tune that no expert answers for."""
    with pytest.raises(SlmError, match="task.expert_review"):
        require(make_settings(tmp_path, task=task), make_contract())
    settings = make_settings(tmp_path, task={**task, "expert_review": "Dr. Ada Voss"})
    require(settings, make_contract())
    assert "reviewed by Dr. Ada Voss" in task_text(settings, make_contract())


def test_nothing_is_written_for_an_incomplete_contract(tmp_path):
    """Guards against a half-made task.md."""
    settings = make_settings(tmp_path)
    with pytest.raises(SlmError):
        write_spec(settings, make_contract(brief={}))
    assert not (tmp_path / "task.md").exists() and not (tmp_path / "specs").exists()


def test_task_md_has_the_eight_sections_in_order(tmp_path):
    """Guards against a section that gets lost between contract and page."""
    heads = [line[3:] for line in task_text(make_settings(tmp_path), make_contract()).splitlines() if line.startswith("## ")]
    assert heads == [
        "Goal", "Inputs", "Output Contract", "Non-goals", "Failure Modes", "Metrics", "Deployment Target",
        "Cost and Latency Target",
    ]  # fmt: skip


def test_task_md_shows_what_each_field_may_hold(tmp_path):
    """Guards against an output contract in prose that says less than the schema."""
    text = task_text(make_settings(tmp_path), make_contract())
    assert "| `label` | `a`, `b`, `none` | critical |" in text and "What it is about." in text


def test_the_committed_task_and_schema_are_what_01_writes(tmp_path):
    """Guards against a contract that was changed while task.md and the schema still say the old thing."""
    from task.contract import contract

    try:
        settings = load_settings(start=ROOT)
    except SlmError:  # the template itself: its project.yaml has still to be rendered
        settings = Settings()
    require(settings, contract)
    assert (ROOT / "task.md").read_text(encoding="utf-8") == task_text(settings, contract)
    assert json.loads((ROOT / "specs/output_schema.json").read_text(encoding="utf-8")) == contract.schema
