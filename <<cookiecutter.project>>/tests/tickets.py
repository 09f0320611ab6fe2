"""A task small enough to know every answer: tickets and calls, for the tests of evaluation and reports."""

import json
import random
from typing import Literal

import pytest
from pydantic import BaseModel, ConfigDict

from slm import registry
from slm.contract import Contract
from slm.evaluate import check_sets, run_baselines, save_baselines, take
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


def run_02(settings):
    sets = check_sets(settings, CONTRACT)
    registry.lock_sets(settings)
    found = run_baselines(settings, CONTRACT, {"dev": take(settings, sets["dev"])}, predict=predict, fewshot=fewshot)
    save_baselines(settings, CONTRACT, found)
    return found
