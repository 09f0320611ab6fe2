"""A project that is kept up to date with the template, through the symlink that cruft looks for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROJECT, copy_template

HOSTILE = 'It said "no" \\ 🦊'


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """The template as a git repository of its own, with one commit."""
    folder = copy_template(tmp_path_factory.mktemp("repository"))
    git(folder, "init", "--quiet", "--initial-branch=main")
    commit(folder, "first")
    return folder


def environment(home: Path) -> dict:
    """No configuration of the user's, and nothing written to the user's home."""
    names = {f"GIT_{who}_{what}": "test@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    return {**os.environ, **names, "HOME": str(home), "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}


def git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, env=environment(folder.parent))
    assert done.returncode == 0, done.stderr
    return done.stdout


def commit(folder: Path, message: str) -> None:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--no-gpg-sign", "-m", message)


def cruft(folder: Path, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "cruft", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment(folder.parent))


def test_create_check_and_update(repository, tmp_path):
    """cruft that finds no template, or an update that loses the user's work or the template's change."""
    made = cruft(tmp_path, "create", str(repository), "--no-input", "--extra-context",
                 json.dumps({"project": "mine", "description": HOSTILE, "license": "MIT"}))  # fmt: skip
    assert made.returncode == 0, made.stdout + made.stderr
    project = tmp_path / "mine"
    assert (project / "notebooks/01_scope.ipynb").is_file() and not (project / "starters").exists()
    git(project, "init", "--quiet", "--initial-branch=main")
    commit(project, "start")
    assert cruft(project, "check").returncode == 0

    with (project / "task.md").open("a") as file:
        file.write("\nA sentence of the user's.\n")
    commit(project, "own work")
    changed = repository / PROJECT.name / "slm/errors.py"
    changed.write_text(changed.read_text() + "\n\nNEW = 1\n")
    readme = repository / PROJECT.name / "README.md"
    readme.write_text(readme.read_text() + "\nNew: <<cookiecutter.project>>.\n")
    commit(repository, "second")

    assert cruft(project, "check").returncode == 1
    done = cruft(project, "update", "--skip-apply-ask")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "NEW = 1" in (project / "slm/errors.py").read_text()
    assert "New: mine." in (project / "README.md").read_text()
    assert (project / "task.md").read_text().endswith("A sentence of the user's.\n")
    assert (project / "LICENSE").read_text().startswith("MIT License")
    assert not list(project.rglob("*.rej"))
    touched = {line[3:] for line in git(project, "status", "--porcelain").splitlines()}
    assert touched == {".cruft.json", "README.md", "slm/errors.py"}
    assert cruft(project, "check").returncode == 0
