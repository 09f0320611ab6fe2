"""The runner: order, parameters that really arrive, failures that name the cell, resuming, one run at a time."""

import json

import nbformat
import pytest
import yaml
from filelock import FileLock

from slm.errors import SlmError
from slm.runner import check_parameters, run, select
from slm.settings import load_settings

PARAMETERS = 'config: str = "project.yaml"\nprofile: str = "default"\nrun_id: str = "dev"\noverrides: dict = {}'


def notebook(path, *cells, tags=("parameters",)):
    """A notebook of a parameters cell and the given code cells."""
    book = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}})
    book.cells = [nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": list(tags)})]
    book.cells += [nbformat.v4.new_code_cell(cell) for cell in cells]
    nbformat.write(book, path)


@pytest.fixture
def project(tmp_path):
    """Two notebooks that leave a mark; the second fails while `stop` is there."""
    (tmp_path / "training/configs").mkdir(parents=True)
    (tmp_path / "training/configs/train_config.yaml").write_text("epochs: 2\n")
    (tmp_path / "project.yaml").write_text(yaml.safe_dump({"profiles": {"smoke": {}}}))
    (tmp_path / "notebooks").mkdir()
    notebook(tmp_path / "notebooks/01_one.ipynb", "open('one', 'a').write(f'{profile} {run_id} {overrides}\\n')")
    notebook(tmp_path / "notebooks/02_two.ipynb", "import os", "assert not os.path.exists('stop'), 'there is a stop'", "open('two', 'a').write('x')")
    return tmp_path


def go(project, *stages, resume=False, overrides=None):
    """Run stages of the project under one run id."""
    settings = load_settings(start=project, profile="smoke", run_id="r1", overrides=overrides or {})
    return run(settings, list(stages or ["all"]), "project.yaml", overrides or {}, resume)


def test_parameters_reach_the_notebook(project):
    """Guards against papermill that runs the defaults and exits 0."""
    go(project, "01", overrides={"train.epochs": 1})
    assert (project / "one").read_text() == "smoke r1 {'train.epochs': 1}\n"
    assert (project / "outputs/runs/r1/notebooks/01_one.ipynb").is_file()


def test_a_notebook_without_the_tag_is_refused(project):
    """Guards against the tag that a cleaning tool deleted."""
    notebook(project / "notebooks/02_two.ipynb", "1", tags=())
    with pytest.raises(SlmError, match=r"02_two\.ipynb: 0 cells carry the tag"):
        check_parameters(project / "notebooks/02_two.ipynb")
    with pytest.raises(SlmError, match="0 cells"):
        go(project)
    assert not (project / "one").exists()


def test_a_failure_names_the_cell_and_resume_goes_on_from_there(project):
    """Guards against a failure that does not say where, and a resume that does everything again."""
    (project / "stop").touch()
    with pytest.raises(SlmError, match=r"02_two\.ipynb, cell \d+ \(assert not .*there is a stop"):
        go(project)
    assert json.loads((project / "outputs/runs/r1/state.json").read_text())["02_two"]["status"] == "failed"
    (project / "stop").unlink()
    go(project, resume=True)
    assert (project / "one").read_text().count("\n") == 1 and (project / "two").read_text() == "x"
    go(project, resume=True)
    assert (project / "two").read_text() == "x"


def test_resume_runs_again_what_other_settings_made(project):
    """Guards against a resume that keeps the results of settings no longer in force."""
    go(project, "01")
    go(project, "01", resume=True, overrides={"train.epochs": 1})
    assert (project / "one").read_text().count("\n") == 2


def test_one_run_id_runs_once_at_a_time(project):
    """Guards against two runs that write over each other."""
    (project / "outputs/runs/r1").mkdir(parents=True)
    with FileLock(project / "outputs/runs/r1/.lock"), pytest.raises(SlmError, match="already running"):
        go(project)


@pytest.mark.parametrize(
    ("stages", "names"),
    [(["all"], ["01_one", "02_two"]), (["02"], ["02_two"]), (["01-02"], ["01_one", "02_two"]), (["02_two", "01"], ["01_one", "02_two"])],
)
def test_stages_are_chosen_in_order(project, stages, names):
    """Guards against a span or a name that picks the wrong notebooks."""
    assert [p.stem for p in select(load_settings(start=project), stages)] == names


def test_an_unknown_stage_is_refused(project):
    """Guards against a run of nothing that looks like success."""
    with pytest.raises(SlmError, match="no notebook '09'; there are: all, 01, 02"):
        select(load_settings(start=project), ["09"])
