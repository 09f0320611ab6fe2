"""Scorers, metrics, comparisons, baselines and release gates, each with the fault it must catch."""

import json
import random
from typing import Literal

import pytest
from pydantic import BaseModel, ConfigDict

from slm import registry
from slm.contract import Contract
from slm.errors import SlmError
from slm.evaluate import (
    check_sets,
    run_baselines,
    save_baselines,
    score_row,
    take,
)  # fmt: skip
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
