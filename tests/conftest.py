"""A clean copy of the template, and bakes of it that leave the user's home alone."""

import shutil
import subprocess
from pathlib import Path

import pytest
from cookiecutter.main import cookiecutter

ROOT = Path(__file__).resolve().parents[1]
PROJECT = ROOT / "<<cookiecutter.project>>"


def pytest_collection_modifyitems(items):
    """`make test` runs two files at a time: the longest comes first."""
    items.sort(key=lambda item: item.path.stem != "test_own_tests")


def files_of(folder: Path) -> list[str]:
    """Tracked files, and untracked ones that git does not ignore: what a clone would hold. Sorted, relative."""
    command = ["git", "ls-files", "-coz", "--exclude-standard", "--deduplicate"]
    out = subprocess.run(command, cwd=folder, capture_output=True, check=True, text=True).stdout
    return sorted(name for name in out.split("\0") if name and (folder / name).exists())


def copy_template(target: Path) -> Path:
    """The template as a clone would hold it, symlinks as symlinks."""
    for name in files_of(ROOT):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name, follow_symlinks=False)
    return target


@pytest.fixture(scope="session")
def template(tmp_path_factory) -> Path:
    """A clean copy of the template; do not change it."""
    return copy_template(tmp_path_factory.mktemp("template"))


@pytest.fixture(scope="session")
def no_home(tmp_path_factory) -> Path:
    """A cookiecutter configuration without the user's defaults, whose replay files land in a temporary folder."""
    folder = tmp_path_factory.mktemp("cookiecutter")
    (folder / "config.yaml").write_text(f"cookiecutters_dir: {folder}\nreplay_dir: {folder}\n", encoding="utf-8")
    return folder / "config.yaml"


@pytest.fixture(scope="session")
def bake(template, no_home, tmp_path_factory):
    """bake(project="x", task="tool_calls", …) -> the new project's folder."""

    def make(output_dir: Path | None = None, **answers) -> Path:
        folder = output_dir or tmp_path_factory.mktemp("bake")
        made = cookiecutter(
            str(template), no_input=True, extra_context=answers, output_dir=str(folder), config_file=str(no_home)
        )
        return Path(made)

    return make


@pytest.fixture(scope="session")
def baked(bake) -> Path:
    """The default project; do not change it: copy it first."""
    return bake()
