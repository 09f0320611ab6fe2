"""The whole loop, for real: a bake, eight notebooks through papermill, then what they left behind."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
STAGES = [
    "01_scope", "02_baseline", "03_generate", "04_curate", "05_train", "06_evaluate", "07_repair", "08_export",
]  # fmt: skip


def slm(project: Path, *arguments: str) -> subprocess.CompletedProcess:
    """`python -m slm` in a project, offline."""
    env = {
        **os.environ, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    env.pop("PYTEST_CURRENT_TEST", None)
    command = [sys.executable, "-m", "slm", *arguments]
    return subprocess.run(command, cwd=project, env=env, capture_output=True, text=True, timeout=2700)


def registry(project: Path, name: str) -> list[dict]:
    """The records of a registry file."""
    return [json.loads(line) for line in (project / f"registry/{name}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="session")
def ran(bake) -> Path:
    """A default project after `run all` with the tiny model."""
    project = bake(project="pipeline")
    done = slm(project, "run", "all", "--profile", "smoke", "--run-id", "first", "-s", "train.max_steps=3")
    assert done.returncode == 0, done.stdout + done.stderr
    return project


def test_every_stage_is_done_and_its_notebook_kept(ran):
    """A stage that was skipped, or an executed notebook that was thrown away."""
    state = json.loads((ran / "outputs/runs/first/state.json").read_text())
    assert [name for name, record in sorted(state.items()) if record["status"] == "done"] == STAGES
    for stage in STAGES:
        book = json.loads((ran / f"outputs/runs/first/notebooks/{stage}.ipynb").read_text())
        ran_cells = [c for c in book["cells"] if c["cell_type"] == "code" and c["execution_count"]]
        assert len(ran_cells) >= 5, stage


def test_each_stage_leaves_its_artefacts(ran):
    """A stage that says it is done and wrote nothing."""
    expected = """
        task.md specs/output_schema.json specs/eval_plan.md data/eval/lock.json baseline_report.md
        data/generated/batch_001.jsonl data/accepted/all.jsonl data/accepted/train.jsonl
        outputs/adapters/first/adapter_model.safetensors outputs/adapters/first/settings.yaml
        outputs/adapters/first/training_log.csv outputs/eval_reports/first/eval_report.md
        outputs/eval_reports/first/eval_report.json outputs/runs/first/repair_plan.json outputs/runs/first/settings.yaml
        outputs/merged/first/model.safetensors outputs/gguf/first/model-f16.gguf outputs/gguf/first/model-q8_0.gguf
        outputs/gguf/first/export.json outputs/gguf/first/Modelfile model_card.md Modelfile
    """.split()
    assert [name for name in expected if not (ran / name).is_file() or not (ran / name).stat().st_size] == []
    assert list((ran / "data/rejected").glob("*.jsonl")) and list((ran / "outputs").rglob("*.png"))


def test_every_planted_fault_was_caught(ran):
    """A gate that lets its own planted fault through."""
    planted = {fault["id"]: fault for fault in json.loads((ran / "data/raw/planted_faults.json").read_text())}
    assert len({fault["fault"] for fault in planted.values()}) >= 10
    accepted = {json.loads(line)["id"] for line in (ran / "data/accepted/all.jsonl").read_text().splitlines()}
    assert sorted(planted.keys() & accepted) == []
    rejected = {}
    for file in (ran / "data/rejected").glob("*.jsonl"):
        for line in file.read_text().splitlines():
            record = json.loads(line)
            rejected[record.get("id") or record.get("row", {}).get("id")] = record
    assert planted.keys() <= rejected.keys()
    assert all(rejected[name]["gate"] and rejected[name]["reason"] for name in planted)


def test_the_registry_names_the_parents(ran):
    """A number in a report whose data and model nobody can name."""
    (dataset,) = registry(ran, "datasets")
    trained = next(r for r in registry(ran, "runs") if r["run_id"] == "first" and r.get("stage") == "train")
    assert trained["parents"]["dataset"] == dataset["version"] and trained["status"] == "completed"
    assert {r["stage"] for r in registry(ran, "runs")} >= {"train", "evaluate", "export"}


def test_the_card_and_modelfile_name_the_run(ran):
    """A model card in the root that belongs to another run."""
    from huggingface_hub import ModelCard

    text = (ran / "model_card.md").read_text(encoding="utf-8")
    assert "first" in text and "first" in (ran / "Modelfile").read_text(encoding="utf-8")
    data = ModelCard(text).data
    assert data.eval_results and data.license and "TODO" not in text


def test_an_untrained_model_is_not_released(ran):
    """Release gates that pass whatever was measured."""
    done = slm(ran, "release", "first", "--profile", "smoke")
    assert done.returncode == 1 and "not released" in done.stderr and "fail" in done.stdout
    assert slm(ran, "release", "absent").returncode == 1


def test_an_override_changes_the_run_and_a_second_run_keeps_the_first(ran):
    """Parameters that papermill passed and nobody read; a rerun that overwrites its predecessor."""
    before = (ran / "outputs/adapters/first/training_log.csv").read_text()
    done = slm(ran, "run", "05", "--profile", "smoke", "--run-id", "second", "-s", "train.max_steps=2", "-s", "train.lora_rank=4")
    assert done.returncode == 0, done.stdout + done.stderr
    ranks = [json.loads((ran / f"outputs/adapters/{name}/adapter_config.json").read_text())["r"] for name in ("first", "second")]
    assert ranks[0] != 4 and ranks[1] == 4
    assert (ran / "outputs/adapters/first/training_log.csv").read_text() == before


@pytest.mark.parametrize(
    ("file", "stage", "message"),
    [
        ("data/eval/golden.jsonl", "06", r"golden.jsonl: changed"),
        ("data/accepted/train.jsonl", "05", r"train.jsonl:\d+"),
    ],
)
def test_a_damaged_file_stops_the_run_with_its_name(ran, tmp_path, file, stage, message):
    """A run that goes on with an edited evaluation set or a torn line."""
    import re

    shutil.copytree(ran, tmp_path / "p", ignore=shutil.ignore_patterns("gguf", "merged"))
    with (tmp_path / "p" / file).open("a", encoding="utf-8") as stream:
        stream.write('{"id": "torn\n')
    done = slm(tmp_path / "p", "run", stage, "--profile", "smoke", "--run-id", "first")
    assert done.returncode == 1 and re.search(message, done.stderr), done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "all", "--profile", "smoke", "-s", "train.epoch=1"], "Did you mean train.epochs"),
        (["run", "09"], "no notebook '09'"),
        (["run", "01", "--run-id", "../x"], "run_id"),
        (["run", "02", "--profile", "smoke", "--run-id", "x", "-s", "model.base=./absent"], "no config.json in that folder"),
    ],
)
def test_bad_input_is_one_sentence(ran, arguments, message):
    """A traceback where one sentence would do."""
    done = slm(ran, *arguments)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


def test_the_scripts_run_as_the_workflow_writes_them(ran, tmp_path):
    """A documented command line that does not work."""
    project = tmp_path / "p"
    shutil.copytree(ran, project, ignore=shutil.ignore_patterns("gguf", "merged"))
    shutil.copytree(project / "outputs/adapters/first", project / "outputs/adapters/run_001")
    good = next(p for p in sorted((project / "data/accepted").glob("all.jsonl")))
    commands = [
        "scripts/run_baseline.py --model rules --eval data/eval/dev.jsonl --out outputs/eval_reports/base_dev.json",
        "scripts/run_baseline.py --model base --eval data/eval/dev.jsonl --out outputs/eval_reports/base_dev.json --profile smoke",
        "scripts/dedupe.py data/generated/batch_001.jsonl --against data/accepted/",
        "scripts/split_data.py data/accepted/all.jsonl",
        f"scripts/validate_jsonl.py {good.relative_to(project)}",
        "scripts/run_eval.py --model outputs/adapters/run_001 --eval data/eval/dev.jsonl --report outputs/eval_reports/run_001_dev.json --profile smoke",
        "scripts/analyze_errors.py outputs/eval_reports/run_001_dev.json",
    ]
    for command in commands:
        done = subprocess.run([sys.executable, *command.split()], cwd=project, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        assert done.stdout.strip(), command
    bad = subprocess.run(
        [sys.executable, "scripts/validate_jsonl.py", "data/generated/batch_001.jsonl"], cwd=project, capture_output=True, text=True
    )
    assert bad.returncode == 1 and "batch_001.jsonl:" in bad.stdout + bad.stderr


TEACHER = """
import json, random, re, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
WORDS = "invoice login export garden bridge window planet coffee sailor marble printer ticket folder station violin".split()
class Handler(BaseHTTPRequestHandler):
    count = 0
    def do_POST(self):
        text = json.loads(self.rfile.read(int(self.headers["content-length"])))["messages"][-1]["content"]
        lines, asked = [], re.search(r"WRITE (\\d+) JSONL", text)
        for _ in range(int(asked[1]) if asked else 0):
            Handler.count += 1
            luck = random.Random(Handler.count)
            output = {"category": re.search(r"CATEGORY (\\S+)", text)[1], "priority": "low", "product": None, "order_id": None,
                      "refund_requested": False, "language": "en"}
            user = " ".join(luck.sample(WORDS, 9)).capitalize() + f", please look into this {luck.choice(WORDS)} soon."
            lines.append(json.dumps({"input": user, "output": output, "language": "en", "group": f"g{Handler.count}"}))
        message = {"role": "assistant", "content": "\\n".join(lines) or "{}"}
        body = json.dumps({"id": "x", "object": "chat.completion", "created": 0, "model": "m",
                           "choices": [{"index": 0, "finish_reason": "stop", "message": message}]}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args):
        pass
server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""


def test_a_repair_round_runs_the_loop_again_and_undoes_what_did_not_help(ran, tmp_path):
    """A repair that never reaches training or its DPO, or that leaves its rows behind when dev is no better."""
    shutil.copytree(ran, project := tmp_path / "p", ignore=shutil.ignore_patterns("gguf", "merged"))
    scores = project / "outputs/eval_reports/first/scores.json"
    results = json.loads(scores.read_text())
    for score in next(r for r in results if (r["name"], r["set"]) == ("fine_tuned", "dev"))["scores"]:
        want = score["expected"]  # planted: every dev row has its priority wrong, and nothing else
        got = {**want, "priority": "low" if want["priority"] == "high" else "high"}
        score |= {"parsed": got, "lenient_parsed": got, "text": json.dumps(got), "stage": None, "finish_reason": "stop"}
        score |= {"value": 5 / 6, "exact": False, "fields": {name: name != "priority" for name in want}}
        score["shares"] |= {"field_f1": 5 / 6, "exact_match": 0.0, "echo_rate": 0.0}
    scores.write_text(json.dumps(results))
    before = (project / "data/accepted/train.jsonl").read_bytes()
    teacher = subprocess.Popen([sys.executable, "-c", TEACHER], stdout=subprocess.PIPE, text=True)
    try:
        url = f"generate.endpoint.url=http://127.0.0.1:{teacher.stdout.readline().strip()}/v1"
        said = ["generate.teacher=openai", url, "generate.endpoint.model=m", "generate.feasible_at=0", "repair.clusters_max=1"]
        said += ["preference.method=dpo", "preference.limit=6", "preference.max_steps=2"]
        done = slm(project, "repair", "first", "--apply", *(part for one in said for part in ("-s", one)))
    finally:
        teacher.kill()
    assert done.returncode == 0, done.stdout + done.stderr
    record = next(r for r in registry(project, "runs") if r["stage"] == "repair")
    assert (record["run_id"], record["status"], record["parents"]["run"]) == ("first-repair-1", "discarded", "first")
    [cluster] = record["rows"]
    assert cluster["asked"] >= 20 and cluster["accepted"] >= 10
    assert (project / "outputs/adapters/first-repair-1/adapter_model.safetensors").is_file()
    tuned = [r["preference"] for r in registry(project, "runs") if r["run_id"] == "first-repair-1" and "preference" in r]
    assert [t["method"] for t in tuned] == ["dpo"] and tuned[0]["metrics"]["pairs"] >= 1
    assert "unchanged" in (project / "outputs/eval_reports/first-repair-1/repair.md").read_text()
    assert (project / "data/accepted/train.jsonl").read_bytes() == before
    [moved] = record["files"]
    assert (project / "outputs/runs/first-repair-1" / moved).is_file() and not (project / "data/generated" / moved).is_file()
