"""TRL and Unsloth on the embedded model: one recipe, one seed, the same rows, so the same curve."""

import csv
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
BOUND = 0.05  # nats per answer token, at every one of the 20 steps; bfloat16 rounds differently in the two
PREPARE = """
from slm import registry
from slm.evaluate import baselines
from slm.rows import read_rows, write_json, write_rows
from slm.settings import load_settings
settings = load_settings(profile="cpu")
rows = read_rows(settings.path("data/raw/seed.jsonl"))
registry.lock_sets(settings)
write_rows(settings.path("data/accepted/train.jsonl"), rows[:40])
write_rows(settings.path("data/accepted/dev_internal.jsonl"), rows[40:44])
write_json(settings.path("outputs/eval_reports/dev/baselines.json"), {"key": baselines._key(settings), "results": []})
"""


def run(project: Path, *command: str) -> str:
    """The output of a Python command in the project, offline; it must succeed."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *command], cwd=project, env=env, capture_output=True, text=True, timeout=2700)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_both_trainers_follow_the_same_curve(bake):
    """Guards against two trainers that are one in name only: other rows or another order of them, another loss mask, schedule,
    scale of the adapter or start of its weights."""
    if find_spec("unsloth") is None:
        pytest.skip("Unsloth is not installed (the extra `unsloth`), so there is nothing to compare TRL with")
    project, curves = bake(project="twins"), {}
    run(project, "-c", PREPARE)
    recipe = {"max_steps": 20, "batch_size_per_device": 2, "eval_steps": 20, "save_steps": 20, "learning_rate": 1e-3}
    overrides = [part for key, value in recipe.items() for part in ("-s", f"train.{key}={value}")]
    for name in ("train_trl_peft", "train_unsloth"):
        said = run(project, f"training/{name}.py", "--profile", "cpu", "--run-id", name, *overrides)
        assert f"outputs/adapters/{name}: 20 steps" in said
        with (project / f"outputs/adapters/{name}/training_log.csv").open() as stream:
            lines = list(csv.DictReader(stream))
        curves[name] = [[float(x[c]) for x in lines if x[c]] for c in ("loss", "eval_loss", "num_tokens")]
    (plain, plain_dev, tokens), (unsloth, unsloth_dev, unsloth_tokens) = curves.values()
    print({"apart": [round(abs(a - b), 4) for a, b in zip(plain, unsloth, strict=True)], "plain": plain, "dev": [plain_dev, unsloth_dev]})
    assert len(plain) == 20 and tokens == unsloth_tokens
    assert max(abs(a - b) for a, b in zip(plain + plain_dev, unsloth + unsloth_dev, strict=True)) < BOUND
    assert plain_dev[0] - plain_dev[-1] > 10 * BOUND  # it learns far more than the bound
    assert max(abs(a - b) for a, b in zip(plain, unsloth[1:], strict=False)) > 4 * BOUND  # planted: one step late is seen
