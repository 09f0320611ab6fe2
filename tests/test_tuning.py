"""DPO, ORPO and GRPO for real on the embedded model, a few steps each, on what a short fine-tune of it gets wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
OPTIONS = {
    "train.max_steps": 8, "train.eval_steps": 8, "train.save_steps": 8, "train.batch_size_per_device": 4, "train.lora_layers": 8,
    "evaluate.limit": 6, "evaluate.max_new_tokens": 40, "evaluate.resamples": 200,
    "preference.limit": 6, "preference.max_steps": 2, "preference.generations": 2, "preference.learning_rate": 5e-4,
}  # fmt: skip
SCRIPT = """
import json, sys
from pathlib import Path
from slm import registry
from slm.errors import SlmError
from slm.evaluate import baselines
from slm.rows import read_rows, write_json, write_rows
from slm.settings import load_settings
from slm.train import preference, train
from task.contract import contract

own = json.loads(sys.argv[1])
settings = load_settings(profile="cpu", overrides=own, run_id="r1")
rows, seen = read_rows("data/raw/seed.jsonl"), []
write_rows(Path("data/accepted/train.jsonl"), rows[:48])
write_rows(Path("data/accepted/dev_internal.jsonl"), rows[48:54])
registry.lock_sets(settings)
write_json(Path("outputs/eval_reports/r1/baselines.json"), {"key": baselines._key(settings), "results": []})
found = {"sft": train(settings, contract)["metrics"]}

plain = preference.pairs
def pairs(rows, contract):
    seen.extend(rows)
    return plain(rows, contract)
preference.pairs = pairs

for method in ("dpo", "orpo", "grpo"):
    record = preference.tune(load_settings(profile="cpu", overrides={**own, "preference.method": method}, run_id="r1"), contract)
    found[method] = record["preference"]
found["pairs"] = [[row.id, row.answer, row.rejected] for row in seen]

golden = read_rows("data/eval/golden.jsonl")[0].model_copy(update={"id": "planted"})
write_rows(Path("data/accepted/dev_internal.jsonl"), [golden])
try:
    preference.tune(load_settings(profile="cpu", overrides={**own, "preference.method": "dpo"}, run_id="r1"), contract)
except SlmError as error:
    found["refused"] = str(error)
Path("found.json").write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(bake):
    """A baked project after SFT and the three methods on its seed rows, and what they reported."""
    project = bake(project="preference")
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(project)}
    command = [sys.executable, "-c", SCRIPT, json.dumps(OPTIONS)]
    done = subprocess.run(command, cwd=project, env=env, capture_output=True, text=True, timeout=4500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return project, json.loads((project / "found.json").read_text())


@pytest.mark.parametrize("method", ["dpo", "orpo", "grpo"])
def test_each_method_takes_steps_on_the_embedded_model_and_is_judged_on_dev(found, method):
    """A method that runs on a toy alone, or whose verdict no figures stand behind."""
    facts = found[1][method]
    assert facts["method"] == method and facts["metrics"]["steps"] == 2 and facts["metrics"]["pairs"] >= 1
    assert facts["status"] == "discarded" and facts["difference"]["n"] == 6  # six rows prove nothing
    assert facts["verdict"].startswith(f"{method.upper()} discarded, against SFT alone") and " on dev, " in facts["verdict"]
    assert facts["before"] == found[1]["dpo"]["before"] and 0 < facts["metrics"]["general_loss_final"] < 10
    if method == "dpo":
        assert "rewards/margins" in facts["metrics"]
    if method == "grpo":
        assert {"rewards/parses/mean", "rewards/field_category/mean"} <= facts["metrics"].keys()


def test_the_pairs_are_this_model_s_own_failures_and_never_of_a_locked_set(found):
    """Pairs that come from dev, test or golden, or whose rejected answer the model never gave."""
    project, facts = found
    locked = {}
    for file in (project / "data/eval").glob("*.jsonl"):
        locked |= {json.loads(line)["id"]: file.name for line in file.read_text(encoding="utf-8").splitlines()}
    assert len(locked) == 320 and facts["pairs"]
    assert [row for row, _, _ in facts["pairs"] if row in locked] == []
    assert all(rejected is not None and rejected != gold for _, gold, rejected in facts["pairs"])
    assert facts["refused"].startswith(str(project)) and "row planted stands in data/eval" in facts["refused"]


def test_the_sft_adapter_stays_as_it_was(found):
    """Three discarded tunings, one of which has overwritten the adapter."""
    project, facts = found
    lines = [json.loads(line) for line in Path(project / "registry/runs.jsonl").read_text().splitlines()]
    first = next(line for line in lines if line["stage"] == "train" and line["status"] == "completed")
    assert facts["sft"]["steps"] == 8 and facts["sft"]["dev_loss_best"] < facts["sft"]["dev_loss_first"]
    done = [line for line in lines if line["stage"] == "train" and "preference" in line]
    assert len(done) == 3 and all(line["artefacts"] == first["artefacts"] for line in done)
    assert [f.name for f in (project / "outputs/adapters").iterdir() if f.is_dir()] == ["r1"]
    assert [line["status"] for line in lines if line["stage"] == "preference"] == ["failed"]  # the planted golden row
