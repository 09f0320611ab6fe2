"""W&B offline, MLflow's file store and Trackio, each for real on the tiny model: same names, links, and no key anywhere."""

import csv
import importlib.util
import json
import os
import sqlite3
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_train
import yaml
from test_train import SMOKE, contract, row, settings_of

from slm import registry
from slm.errors import SlmError
from slm.rows import write_rows
from slm.train import callbacks, train
from slm.train.callbacks import track

project = test_train.project
# Trackio first: it reads its folder once, when it is imported, and all three run in one process here.
TRACKERS = [name for name in ("trackio", "wandb", "mlflow") if importlib.util.find_spec(name)]
KEYS = {
    "HF_TOKEN": "hf_PlantedHubToken0123456789", "OPENAI_API_KEY": "sk-PlantedTeacherKey0123456789",
    "WANDB_API_KEY": "PlantedTrackerKey0123456789abcdef01234567", "MLFLOW_TRACKING_PASSWORD": "PlantedStorePassword0123",
}  # fmt: skip
SCRIPT = """
import sys
sys.path.insert(0, {root!r})
import slm.evaluate.baselines
slm.evaluate.baselines.require_baselines = lambda settings: None
import trl
from slm.settings import load_settings
from slm.train import train
from task.contract import contract
for tracker in {trackers!r}:
    more = {{"tracker": tracker, "train.max_steps": 2}}
    train(load_settings(start={project!r}, run_id="good-" + tracker, overrides=more), contract)
    plain = trl.SFTTrainer.training_step
    trl.SFTTrainer.training_step = lambda *given: plain(*given) * float("nan")
    try:
        train(load_settings(start={project!r}, run_id="bad-" + tracker, overrides=more), contract)
    except slm.errors.SlmError as error:
        print(error)
    trl.SFTTrainer.training_step = plain
"""


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """A project in which every tracker has seen a run that went well and one whose loss was no number; keys lie in the
    environment and in the address of the repository. Its file output.txt is what was printed."""
    folder = tmp_path_factory.mktemp("tracked")
    (folder / "training/configs").mkdir(parents=True)
    (folder / "training/configs/train_config.yaml").write_text("epochs: 1\n")
    (folder / "project.yaml").write_text(yaml.safe_dump({**SMOKE, "project": {"name": "tracked"}}))
    for name, numbers in (("train", range(8)), ("dev_internal", range(16, 20))):
        write_rows(folder / f"data/accepted/{name}.jsonl", [row(n) for n in numbers])
    files = {n: registry.file_hash(folder / f"data/accepted/{n}.jsonl")[:16] for n in ("train", "dev_internal")}
    registry.append(settings_of(folder), "datasets", {"version": "v7", "split": {"files": files}})
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    subprocess.run(["git", "remote", "add", "origin", "https://me:PlantedGitPassword@example.com/x.git"], cwd=folder, check=True)
    root = str(Path(__file__).resolve().parents[1])
    own = ("WANDB_", "MLFLOW_", "TRACKIO_")
    env = {key: value for key, value in os.environ.items() if not key.startswith(own)}
    env |= {**KEYS, "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    code = SCRIPT.format(root=root, project=str(folder), trackers=TRACKERS)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=900
    )
    assert done.returncode == 0, done.stdout[-3000:]
    (folder / "output.txt").write_text(done.stdout)
    return folder


def wandb_records(file: Path):
    """The records of a .wandb file: a LevelDB log of protocol buffers after a header of seven bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, part = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        part, at = part + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # a whole record, or the last piece of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(part)
            part = b""
            yield record


def seen(folder: Path, tracker: str) -> dict[str, SimpleNamespace]:
    """Run name -> what the tracker holds of it: numbers {name: {step: value}}, config, and how it ended."""
    home, found = folder / "outputs/tracking" / tracker, {}
    if tracker == "wandb":
        for file in home.glob("wandb/offline-run-*/*.wandb"):
            this = SimpleNamespace(numbers={}, config={}, end=None)
            for record in wandb_records(file):
                if record.HasField("run"):
                    found[record.run.display_name] = this
                    this.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
                elif record.HasField("history"):
                    items = {"".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
                    for name in [name for name in items if not name.startswith("_")]:
                        this.numbers.setdefault(name, {})[items["_step"]] = items[name]
                elif record.HasField("exit"):
                    this.end = "failed" if record.exit.exit_code else "finished"
    elif tracker == "mlflow":
        for meta in home.glob("*/*/meta.yaml"):
            numbers = {}
            for file in (meta.parent / "metrics").iterdir():
                parts = [line.split() for line in file.read_text().splitlines()]
                numbers[file.name] = {int(part[2]): float(part[1]) for part in parts}
            config = {file.name: file.read_text() for file in (meta.parent / "params").iterdir()}
            facts = yaml.safe_load(meta.read_text())
            found[facts["run_name"]] = SimpleNamespace(numbers=numbers, config=config, end={3: "finished", 4: "failed"}[facts["status"]])
    else:
        [file] = home.glob("*.db")
        with sqlite3.connect(file) as base:
            for name, config in base.execute("select run_name, config from configs"):
                found[name] = SimpleNamespace(numbers={}, config=json.loads(config), end=None)
            for name, step, text in base.execute("select run_name, step, metrics from metrics"):
                for key, value in json.loads(text).items():
                    found[name].numbers.setdefault(key, {})[step] = value
    return found


@pytest.mark.slow
@pytest.mark.parametrize("tracker", TRACKERS)
def test_every_tracker_gets_the_numbers_of_the_log_under_its_names(tracked, tracker):
    """Guards against a curve that is called eval/loss here and eval_loss there, and against numbers that never arrive."""
    numbers = seen(tracked, tracker)[f"good-{tracker}"].numbers
    log = list(csv.DictReader((tracked / f"outputs/adapters/good-{tracker}/training_log.csv").open()))
    for name in ("loss", "eval_loss", "learning_rate", "grad_norm"):
        wanted = {int(line["step"]): float(line[name]) for line in log if line[name]}
        assert wanted and numbers[name] == pytest.approx(wanted), name
    assert numbers.keys() == seen(tracked, TRACKERS[0])[f"good-{TRACKERS[0]}"].numbers.keys()


@pytest.mark.slow
@pytest.mark.parametrize("tracker", TRACKERS)
def test_a_tracked_run_links_to_dataset_config_and_report_and_ends_as_the_run_did(tracked, tracker):
    """Guards against a curve of which nobody knows the data, and against a failed run that the tracker shows as finished."""
    runs = seen(tracked, tracker)
    assert runs.keys() == {f"good-{tracker}", f"bad-{tracker}"}
    config, run_id = runs[f"good-{tracker}"].config, f"good-{tracker}"
    [record] = [r for r in registry.read(settings_of(tracked), "runs") if r["run_id"] == run_id]
    assert config["parents.dataset"] == "v7" and config["settings"] == record["settings"]
    assert config["report"] == f"outputs/eval_reports/{run_id}/eval_report.md" and (tracked / config["config"]).is_file()
    assert config["parents.base"] == "tiny" and float(config["recipe.learning_rate"]) == 5e-3 and config["recipe_hash"] == record["recipe_hash"]
    if tracker != "trackio":  # which has no such mark
        assert (runs[run_id].end, runs[f"bad-{tracker}"].end) == ("finished", "failed")


@pytest.mark.slow
def test_no_key_is_printed_or_stored(tracked):
    """Guards against a key in a tracker's file, the registry, the settings beside an adapter or the output; the search is
    tried on a planted one first."""

    def hits(folder):
        planted = [key.encode() for key in (*KEYS.values(), "PlantedGitPassword")]
        files = [f for f in folder.rglob("*") if f.is_file() and ".git" not in f.parts]
        return len(files), [f for f in files if any(key in f.read_bytes() for key in planted)]

    for _ in range(600):  # trackio's own process may still be writing its database
        if not [*tracked.rglob("*.db-shm"), *tracked.rglob("*.db-wal")]:
            break
        time.sleep(0.1)
    (tracked / "planted.txt").write_text(f"token {KEYS['HF_TOKEN']}")
    assert hits(tracked)[1] == [tracked / "planted.txt"]
    (tracked / "planted.txt").unlink()
    assert hits(tracked)[0] > 30 and hits(tracked)[1] == []
    assert (tracked / "output.txt").read_text().count("the loss is nan") == len(TRACKERS)


def fake(monkeypatch, run=None, error=None):
    """A package `trackio` whose run is `run`, or that does not start."""

    def init(**_):
        if error:
            raise error
        return run

    monkeypatch.setattr(callbacks, "importlib", SimpleNamespace(import_module=lambda name: SimpleNamespace(init=init)))


def test_a_tracker_that_fails_on_the_way_does_not_end_the_training(project, monkeypatch, capsys):
    """Guards against hours of training that are lost to a tracker's server."""
    calls = []
    broken = SimpleNamespace(log=lambda *given: (calls.append(given), 1 / 0), finish=lambda: calls.append("finish"))
    fake(monkeypatch, broken)
    settings = settings_of(project).model_copy(update={"tracker": "trackio"})
    assert train(settings, contract)["status"] == "completed" and len(calls) == 1
    assert "WARNING: tracker trackio failed (ZeroDivisionError); training goes on without it." in capsys.readouterr().out


def test_a_tracker_that_does_not_start_is_one_sentence_and_a_failed_record(project, monkeypatch):
    """Guards against hours of training that nobody can see, and against an error that carries a key into the registry."""
    fake(monkeypatch, error=RuntimeError(f"no entry with {KEYS['HF_TOKEN']}"))
    settings = settings_of(project).model_copy(update={"tracker": "trackio"})
    with pytest.raises(SlmError, match="tracker trackio: it does not start .*or set tracker csv"):
        train(settings, contract)
    [record] = registry.read(settings, "runs")
    assert record["status"] == "failed" and KEYS["HF_TOKEN"] not in json.dumps(record)


def test_only_the_first_process_tracks(project, monkeypatch):
    """Guards against as many runs in the tracker as there are GPUs."""
    monkeypatch.setenv("RANK", "1")
    fake(monkeypatch, error=RuntimeError("must not start"))
    with track(settings_of(project).model_copy(update={"tracker": "trackio"}), {}, "r1") as callbacks:
        assert callbacks == []
