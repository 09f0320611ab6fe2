"""Sweeps: every cell runs through papermill in a process of its own, here and on Ray; failures, resuming, table and plot."""

import json
import os
from pathlib import Path

import nbformat
import pytest
import yaml

from slm import registry
from slm.curate.split import split_file
from slm.curate.versions import record_dataset, split_of
from slm.errors import SlmError
from slm.rows import make_row, read_rows, write_rows
from slm.settings import load_settings
from slm.train.sweep import Sweep, sweep

ROOT = str(Path(__file__).resolve().parents[1])
STUB = """
from slm import registry
from slm.evaluate import Metric, Result
from slm.rows import append_jsonl, write_json
from slm.settings import load_settings
settings = load_settings(config, profile, overrides, run_id)
recipe = settings.train
append_jsonl(settings.path("ran"), [{"run": run_id, "rank": recipe.lora_rank, "seed": recipe.seed}])
assert recipe.lora_rank != 13 or settings.path("mended").exists(), "an unlucky rank"
value = 0.5 + recipe.lora_rank / 100 + recipe.seed / 50
metric = Metric(value=value, low=value - 0.2, high=value + 0.2, n=60)
result = Result(name="fine_tuned", set="dev", set_hash="s", contract_hash="c", metrics={"field_f1": metric})
write_json(settings.path(f"outputs/eval_reports/{run_id}/scores.json"), [result.model_dump()])
registry.append(settings, "runs", {"stage": "train", "status": "completed", "run_id": run_id, "seconds": 60.0 * recipe.lora_rank, "cost": 0.5})
"""
PARAMETERS = 'config: str = "project.yaml"\nprofile: str = "default"\nrun_id: str = "dev"\noverrides: dict = {}'


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project whose one stage takes a second and leaves scores as 06 does."""
    (tmp_path / "training/configs").mkdir(parents=True)
    (tmp_path / "training/configs/train_config.yaml").write_text("epochs: 1\n")
    (tmp_path / "project.yaml").write_text("profiles: {smoke: {}}\n")
    (tmp_path / "notebooks").mkdir()
    cells = [nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell(STUB)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "notebooks/05_train.ipynb")
    monkeypatch.setenv("PYTHONPATH", ROOT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def grid(project, **more) -> Path:
    """A grid file of two ranks and two seeds, with changes."""
    body = {"name": "s1", "profile": "smoke", "stages": ["05"], "workers": 2, "grid": {"rank": [4, 8], "seed": [0, 1]}} | more
    (project / "grid.yaml").write_text(yaml.safe_dump(body))
    return project / "grid.yaml"


def ran(project) -> list[tuple]:
    """(rank, seed) of every cell that started, in order of both."""
    return sorted((r["rank"], r["seed"]) for r in map(json.loads, (project / "ran").read_text().splitlines()))


@pytest.mark.slow
def test_every_cell_runs_and_seeds_become_an_interval(project):
    """Guards against settings that never reach a cell, and against a winner that is one lucky seed."""
    first, second = sweep(grid(project))
    assert ran(project) == [(4, 0), (4, 1), (8, 0), (8, 1)]
    assert (first["train.lora_rank"], first["runs"], first["failed"], first["minutes"]) == (8, 2, 0, 8.0)
    assert first["score"].value == pytest.approx(0.59) and first["score"].n == 2 and second["score"].value == pytest.approx(0.55)
    assert first["score"].high - first["score"].value == pytest.approx(12.706 * 0.01, rel=1e-3)  # t, one degree of freedom
    text = (project / "outputs/sweeps/s1/sweep.md").read_text()
    assert "| 8 |" in text.replace("  ", " ") and (project / "outputs/sweeps/s1/sweep.png").stat().st_size > 5000


@pytest.mark.slow
def test_a_failing_cell_stops_no_other_and_the_next_sweep_runs_it_alone(project):
    """Guards against a night of training that one bad cell ends, and against paying twice for what is done."""
    file = grid(project, grid={"rank": [13, 4]})
    with pytest.raises(SlmError, match=r"^1 of 2 cells failed, s1-\w{8}: 05_train.ipynb, cell \d .*an unlucky rank"):
        sweep(file)
    assert ran(project) == [(4, 0), (13, 0)] and (project / "outputs/sweeps/s1/sweep.png").is_file()
    assert "| 0 | 1 |" in (project / "outputs/sweeps/s1/sweep.md").read_text()
    (project / "mended").touch()
    assert [p["train.lora_rank"] for p in sweep(file)] == [13, 4]
    assert ran(project) == [(4, 0), (13, 0), (13, 0)]
    assert len(sweep(grid(project, grid={"rank": [13, 4, 2]}))) == 3  # a grid that grew asks for the new cell alone
    assert ran(project)[0] == (2, 0) and len(ran(project)) == 4


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"grid": {"rank": [4], "train.lerning_rate": [1]}}, "lerning_rate: unknown setting"), ({"grid": {"rank": [0, 4]}}, "lora_rank"),
        ({"stages": ["07"]}, "no notebook '07'"), ({"grids": {}}, "grids"), ({"name": "a b"}, "name"), ({"grid": {}}, "grid"),
        ({"grid": {"rank": []}}, "grid.rank"), ({"profile": "none"}, "no profile"), ({"grid": {"data": ["abc"]}}, "no such version"),
    ],
)  # fmt: skip
def test_a_bad_grid_is_refused_before_anything_runs(project, change, problem):
    """Guards against a typo that is found after the first night."""
    with pytest.raises(SlmError, match=problem):
        sweep(grid(project, **change))
    assert not (project / "ran").exists() and not (project / "outputs").exists()


def test_a_grid_that_is_not_there_is_one_sentence(project):
    """Guards against a traceback for a wrong path or broken YAML."""
    (project / "bad.yaml").write_text("name: [")
    for file in ("none.yaml", "bad.yaml"):
        with pytest.raises(SlmError, match="a sweep has name, grid"):
            sweep(project / file)


def test_a_cell_keeps_its_run_id_in_another_grid():
    """Guards against a grown grid that runs everything again, and against two sweeps that share a run."""
    small, large = (Sweep(name="s", grid={"rank": ranks, "learning_rate": [1e-4]}) for ranks in ([8], [4, 8]))
    assert set(small.cells) < set(large.cells) and not set(Sweep(name="t", grid=small.grid).cells) & set(large.cells)
    assert not set(Sweep(name="s", grid=small.grid, settings={"train.epochs": 1}).cells) & set(large.cells)


@pytest.mark.slow
def test_the_cells_run_on_a_cluster_of_two_nodes(project, monkeypatch):
    """Guards against a `--ray` that is only an option; a cell that fails there is one cell too."""
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install -e .[scale]")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        nodes.add_node(num_cpus=1)
        with pytest.raises(SlmError, match="1 of 3 cells failed.*unlucky"):
            sweep(grid(project, grid={"rank": [4, 13, 8]}), ray=nodes.address)
        assert {node["Alive"] for node in ray.nodes()} == {True} and len(ray.nodes()) == 2
        (project / "mended").touch()
        assert len(sweep(grid(project, grid={"rank": [4, 13, 8]}), ray=nodes.address)) == 3
    finally:
        ray.shutdown()
        nodes.shutdown()
    assert ran(project) == [(4, 0), (8, 0), (13, 0), (13, 0)]


def test_no_cluster_is_one_sentence(project):
    """Guards against a traceback, or a cluster of one that is started in silence."""
    pytest.importorskip("ray", reason="ray is not installed: pip install -e .[scale]")
    with pytest.raises(SlmError, match=r"^--ray: no cluster at 'auto'.*ray start --head"):
        sweep(grid(project), ray="auto")


def test_training_takes_the_rows_of_an_earlier_version(tmp_path):
    """Guards against a sweep over dataset versions that trains every cell on today's rows."""
    (tmp_path / "training/configs").mkdir(parents=True)
    (tmp_path / "training/configs/train_config.yaml").write_text("epochs: 1\n")
    (tmp_path / "project.yaml").write_text("{}\n")
    file, sides, versions = tmp_path / "data/accepted/all.jsonl", [], []
    for count in (20, 30):
        settings = load_settings(start=tmp_path, overrides={"curate.seed": count})
        write_rows(file, [make_row(f"row {n} of them", "yes", category="a") for n in range(count)])
        versions.append(record_dataset(settings, file, split_file(settings, file), [], []))
        sides.append([row.id for row in read_rows(tmp_path / "data/accepted/train.jsonl")])
    now, then = (load_settings(start=tmp_path, overrides={"train.dataset": v}) for v in ("", versions[0]["version"][:6]))
    assert [row.id for row in read_rows(split_of(now, "train"))] == sides[1]
    assert [row.id for row in read_rows(split_of(then, "train"))] == sides[0] != sides[1]
    assert registry.file_hash(split_of(then, "dev_internal"))[:16] == versions[0]["split"]["files"]["dev_internal"]
    (tmp_path / f"registry/datasets/{versions[1]['version']}.jsonl.gz").unlink()
    with pytest.raises(SlmError, match="not in registry/datasets"):
        split_of(load_settings(start=tmp_path, overrides={"train.dataset": versions[1]["version"]}), "train")
    assert os.listdir(tmp_path / ".cache/datasets") == [f"{versions[0]['version']}-{versions[0]['hash']}"]
