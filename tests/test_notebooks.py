"""The notebooks as files: papermill's tag, budgets, no outputs, and nothing that export or clean would change."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROJECT

NAMES = ["01_scope", "02_baseline", "03_generate", "04_curate", "05_train", "06_evaluate", "07_repair", "08_export", "flywheel"]
PARAMETERS = 'config: str = "project.yaml"\nprofile: str = "default"\nrun_id: str = "dev"\noverrides: dict = {}'


def load(name: str) -> dict:
    path = PROJECT / "notebooks" / f"{name}.ipynb"
    if not path.is_file():
        pytest.fail(f"notebooks/{name}.ipynb is missing")
    return json.loads(path.read_text(encoding="utf-8"))


def source(cell: dict) -> str:
    return "".join(cell["source"])


def code_cells(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def tagged(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if "parameters" in cell["metadata"].get("tags", [])]


def exported(cell: dict) -> bool:
    return source(cell).startswith("#| export")


def test_exactly_eight_numbered_notebooks_and_the_flywheel():
    """A stage that is missing, or a scratch notebook left behind: every test below would pass by absence."""
    assert sorted(path.stem for path in (PROJECT / "notebooks").glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_one_parameters_cell_the_same_in_all(name):
    """papermill would run the defaults and exit 0."""
    cells = tagged(load(name))
    assert [source(cell).strip() for cell in cells] == [PARAMETERS]
    assert cells[0]["cell_type"] == "code"


@pytest.mark.parametrize("cell_id", ["colab", "params"])
def test_shared_cells_are_the_same_in_all(cell_id):
    """Nine copies of one cell that drift apart."""
    found = {name: [source(cell) for cell in load(name)["cells"] if cell["id"] == cell_id] for name in NAMES}
    assert {len(cells) for cells in found.values()} == {1}, found
    assert len({cells[0] for cells in found.values()}) == 1


@pytest.mark.parametrize("name", NAMES)
def test_budget(name):
    """A notebook that grows into a program: logic belongs to slm, where it is tested."""
    notebook = load(name)
    assert 8 <= len(notebook["cells"]) <= 20
    for cell in code_cells(notebook):
        lines = source(cell).strip().splitlines()
        if not exported(cell):
            assert len(lines) <= 12, f"{name}, cell {cell['id']}: {len(lines)} lines"
            found = re.search(r"^\s*(def|class|async def) |\blambda\b.*\blambda\b", source(cell), re.M)
            assert not found, f"{name}, cell {cell['id']}: {found[0]}"


@pytest.mark.parametrize("name", NAMES)
def test_committed_without_outputs_and_with_stable_ids(name):
    """A diff on every run, or a secret in an output."""
    notebook = load(name)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    for name_of_cell in ids:
        assert re.fullmatch(r"[a-z][a-z0-9_-]{1,63}", name_of_cell), f"{name}: id {name_of_cell} is not one of ours"
    for cell in code_cells(notebook):
        assert not cell["outputs"] and cell["execution_count"] is None, f"{name}, cell {cell['id']}"


@pytest.mark.parametrize("name", NAMES)
def test_beats(name):
    """A notebook that does not say what it reads and writes, or that ends without a gate."""
    notebook = load(name)
    head = "\n".join(source(cell) for cell in notebook["cells"][:2])
    assert re.match(r"# \S.*\n+> \S", head)
    assert all(word in head for word in ("Reads", "Writes", "Next"))
    code = "\n".join(source(cell) for cell in code_cells(notebook))
    assert "from slm.notebook import" in code and "start(config, profile, run_id, overrides)" in code
    assert "passed(" in code, "no gate"
    assert not re.search(r"#\|\s*eval:\s*false|skip_execution", code)


def test_cells_outside_export_know_no_starter():
    """A notebook that works for one starter only."""
    words = re.compile(r"refund|order_id|not_support|Triage|ToolCall|support_triage|tool_calls")
    for name in NAMES:
        for cell in code_cells(load(name)):
            assert exported(cell) or not words.search(source(cell)), f"{name}, cell {cell['id']}"


def run(folder: Path, *command: str) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "XDG_CONFIG_HOME": str(folder.parent / "config")}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def contents(folder: Path) -> dict[str, bytes]:
    paths = [*folder.glob("*.*"), *(folder / "notebooks").iterdir(), *(folder / "task").glob("*.py")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths
            if path.is_file() and path.name != "_modidx.py"}  # fmt: skip


@pytest.mark.parametrize("command", ["nbdev-clean", "nbdev-export"])
def test_clean_and_export_change_nothing(bake, command):
    """A commit after every clean, code in `task/` that is not the notebooks', or a file that nbdev adds."""
    project = bake(project=command)
    before = contents(project)
    assert sum(name.endswith(".ipynb") for name in before) == len(NAMES)
    run(project, command)
    after = contents(project)
    assert {name for name in before | after if before.get(name) != after.get(name)} == set()


def test_parameters_tag_survives_clean(bake):
    """nbdev-clean deletes the tag unless the settings name it, and papermill then runs the defaults and exits 0."""
    project = bake(project="tags")
    run(project, "nbdev-clean")
    for name in NAMES:
        assert len(tagged(json.loads((project / f"notebooks/{name}.ipynb").read_text(encoding="utf-8")))) == 1, name
    toml = project / "pyproject.toml"
    toml.write_text(toml.read_text().replace('allowed_cell_metadata_keys = ["tags"]\n', ""))
    run(project, "nbdev-clean")
    lost = [name for name in NAMES if not tagged(json.loads((project / f"notebooks/{name}.ipynb").read_text()))]
    assert lost == NAMES, "this test would not see a lost tag"


@pytest.mark.parametrize("name", ["01_scope", "05_train"])
def test_open_and_save_keep_ids_and_tags(bake, name):
    """A notebook edited as a script that comes back with new ids or without papermill's tag."""
    project = bake(project="edited")
    before = contents(project)
    for target in ("open-script", "save-script"):
        run(project, "make", target, f"NB={name[:2]}", f"VENV={sys.prefix}")
        if target == "open-script":
            script = project / f".cache/nb/{name}.py"
            text = script.read_text(encoding="utf-8")
            script.write_text(re.sub(r"^# > ", "# > Edited. ", text, count=1, flags=re.M), encoding="utf-8")
    after = contents(project)
    changed = {path for path in before if before[path] != after[path]} - {path for path in before if path.startswith("task/")}
    assert changed == {f"notebooks/{name}.ipynb"}
    old, new = (json.loads(which[f"notebooks/{name}.ipynb"]) for which in (before, after))
    assert "> Edited. " in source(new["cells"][0])
    new["cells"][0] = old["cells"][0]
    assert new == old
