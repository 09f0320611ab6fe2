"""The other starter's tests, and the notebooks under nbdev-test."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
QUICK = ["core", "curate", "generate", "forget", "metrics", "production", "repair", "report", "runner", "scope"]


def run(folder: Path, *command: str, **env: str) -> subprocess.CompletedProcess:
    """A command of this environment in a project's folder, offline."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    full = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", **env}
    return subprocess.run(command, cwd=folder, env=full, capture_output=True, text=True, timeout=4500)


def passed(done: subprocess.CompletedProcess) -> int:
    """How many tests pytest says have passed; asserts that none failed."""
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return int(re.search(r"(\d+) passed", done.stdout)[1])


def test_the_other_starter_s_tests_pass(bake):
    """Tests, or code under them, that only hold for the default starter."""
    project = bake(project="other-tests", task="tool_calls")
    files = [f"tests/test_{name}.py" for name in QUICK]
    assert passed(run(project, sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *files)) > 200


def test_the_notebooks_run_under_nbdev_test(bake):
    """Notebooks that only run through papermill; nbdev-test exits 0 when it finds none, so each must leave its mark."""
    project = bake(project="nbdev-run")
    done = run(project, "nbdev-test", "--n-workers", "0", SLM_PROFILE="smoke")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    made = ["data/accepted/all.jsonl", "outputs/adapters/dev/adapter_model.safetensors", "outputs/gguf/dev/export.json"]
    assert [name for name in made if not (project / name).is_file()] == []
