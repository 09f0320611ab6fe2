"""Deletion: nothing of a person is left in any file, what was trained on it is named, and nothing else is touched."""

import gzip
import json
import sqlite3
from pathlib import Path

import pytest
from typer.testing import CliRunner

from slm import cli, registry
from slm.curate.decisions import read_decisions
from slm.curate.versions import record_dataset
from slm.errors import SlmError
from slm.evaluate.release import check
from slm.production import forget as deletion
from slm.production.forget import PENDING, forget, plan
from slm.rows import append_jsonl, digest, make_row, write_json, write_rows, write_text
from slm.settings import Settings

WHO = "customer-4711"
NAME = "Imke Brandströmer"
TEXT = f"hi, {NAME} here from the pottery.\nour shift list is public on the web, order TL-61834 & \"all\" my numbers!"
ANSWER = '{"label":"leak","order":"TL-61834"}'
OTHER = "the export stops at page four since the last update of the ledger"
PIECES = (NAME, "Brandströmer", "from the pottery", "shift list is public", "TL-61834", WHO, "imke-brandstr")


@pytest.fixture
def project(tmp_path):
    """A project in which one customer's message stands in every kind of file."""
    settings = Settings()
    settings._root = tmp_path
    root = tmp_path
    write_text(root / "project.yaml", "project: {name: toy}\n")
    write_text(root / "training/configs/train_config.yaml", "{}\n")
    group = "production-" + digest(WHO)
    mine = make_row(TEXT, ANSWER, id="p-000777", category="leak", source="production", group=group, provenance={"request_id": "req-77"})
    eval_row = make_row(TEXT, ANSWER, id="dev-0123", category="leak")
    rows = [make_row(f"{OTHER} number {n}", '{"label":"bug"}', id=f"t-{n:04d}", category="bug") for n in range(6)]
    write_rows(root / "data/generated/production.jsonl", [mine, rows[0]])
    write_rows(root / "data/accepted/all.jsonl", [*rows, mine])
    write_rows(root / "data/accepted/train.jsonl", [mine, *rows[:4]])
    record_dataset(settings, root / "data/accepted/all.jsonl", {"rows": {}, "files": {}}, ["data/generated/production.jsonl"], [])
    old = registry.append(settings, "datasets", {"version": "aaaaaaaaaaaa", "parents": {"data/raw/seed.jsonl": "x"}})
    append_jsonl(root / "data/rejected/production.jsonl", [
        {"gate": "duplicates", "reason": "twin", "evidence": {"twin": "t-0001"}, "row": mine.model_dump(exclude_none=True)},
        {"gate": "json_validity", "reason": "not JSON", "evidence": {}, "raw": '{"input": "' + TEXT.replace("\n", "\\n") + '"'},
        {"gate": "json_validity", "reason": "not JSON", "evidence": {}, "raw": '{"input": "' + TEXT[:48]},
    ])  # fmt: skip
    for name, kept in (("dev", [eval_row, *rows[4:]]), ("test", rows[:1]), ("adversarial", rows[:1]), ("golden", rows[:1])):
        write_rows(root / f"data/eval/{name}.jsonl", kept)
    registry.lock_sets(settings)
    log = {"time": "2026-11-02T08:00:00Z", "output": ANSWER, "latency_s": 1, "parse_ok": True, "model_version": "m", "consent": True}
    append_jsonl(root / "data/raw/requests.jsonl.1", [{"request_id": "req-77", "input": TEXT, "group": WHO, **log}, {"request_id": "req-78", "input": OTHER, **log, "output": "{}"}])
    append_jsonl(root / "data/raw/requests.jsonl", [{"request_id": "req-77", "time": log["time"], "correction": ANSWER}])
    append_jsonl(root / "data/raw/production_review.jsonl", [{"why": "x", "request_id": "req-77", "input": TEXT, "group": group, **log}])
    append_jsonl(root / "data/raw/decisions.jsonl", [{"id": "p-000777", "decision": "edit", "reviewer": "A", "time": "t", "answer": ANSWER}])
    with (root / "data/raw/requests.jsonl").open("a") as stream:
        stream.write('{"request_id": "req-79", "input": "hi, ' + NAME + " here from the pottery")  # torn
    registry.append(settings, "judge", {"id": "p-000777", "prompt": "q", "text": f"{NAME} leaks TL-61834"})
    run = {"stage": "train", "status": "completed", "recipe": {}}
    version = registry.latest(settings, "datasets", rows=7)["version"]
    registry.append(settings, "runs", {**run, "run_id": "mine", "parents": {"dataset": version}})
    registry.append(settings, "runs", {**run, "run_id": "other", "parents": {"dataset": old["version"]}})
    registry.append(settings, "runs", {"stage": "train", "run_id": "x", "status": "failed", "error": f"SlmError: row p-000777: {TEXT}"})
    (root / "outputs/gguf/mine").mkdir(parents=True)
    (root / "outputs/gguf/mine/model-q8_0.gguf").write_bytes(b"GGUF")
    (root / "outputs/adapters/mine").mkdir(parents=True)
    (root / "outputs/adapters/mine/adapter_model.safetensors").write_bytes(b"w")
    reports = root / "outputs/eval_reports/mine"
    failed = {"set": "dev", "row_id": "dev-0123", "user": TEXT, "text": ANSWER}
    write_json(reports / "eval_report.json", {"sets": {"dev": {"hash": "h"}}, "failures": [failed, {"row_id": "t-0004", "user": OTHER}], "note": TEXT[:60]})
    write_json(reports / "scores.json", [{"name": "m", "scores": [{"row_id": "dev-0123", "text": ANSWER}, {"row_id": "t-0004", "text": "x"}]}])
    quoted = "".join(f"> {line}\n" for line in TEXT.splitlines())
    write_text(reports / "eval_report.md", f"# Report\n\n## Worst\n\n### dev-0123 (dev, canonical)\n\n{quoted}\n| order | TL-61834 |\n\n### t-0004 (dev, x)\n\n{OTHER}\n\n## End\n")
    shown = TEXT.replace("&", "&amp;").replace('"', "&quot;")
    write_text(reports / "eval_report.html", f"<h2>Worst</h2>\n<h3>dev-0123 (dev)</h3>\n<pre>{shown}</pre>\n<td>TL-61834</td>\n<h3>t-0004 (dev)</h3>\n<p>{OTHER}</p>\n</main>")
    cells = [{"cell_type": "code", "id": "a", "source": ["show(row)\n"], "outputs": [{"output_type": "stream", "text": [TEXT[:70] + "…\n"]}]},
             {"cell_type": "code", "id": "b", "source": ["scores"], "outputs": [{"output_type": "stream", "text": ["dev-0123: TL-61834\n"]}]},
             {"cell_type": "code", "id": "c", "source": ["other"], "outputs": [{"output_type": "stream", "text": [OTHER]}]}]  # fmt: skip
    write_json(root / "outputs/runs/mine/notebooks/06_evaluate.ipynb", {"cells": cells, "metadata": {"widgets": {"state": {"card": TEXT}}}})
    (root / ".cache").mkdir(exist_ok=True)
    for name, sql in (("teacher", "replies (n INTEGER, key TEXT, job TEXT, text TEXT, used INT)"), ("answers", "answers (key TEXT, answer TEXT)")):
        with sqlite3.connect(root / f".cache/{name}.sqlite") as store:
            store.execute(f"CREATE TABLE {sql}")
            cells = (1, "k", json.dumps([TEXT]), ANSWER, 1) if name == "teacher" else ("k", json.dumps({"text": ANSWER}))
            store.execute(f"INSERT INTO {name if name == 'answers' else 'replies'} VALUES ({','.join('?' * len(cells))})", cells)
        store.close()
    return settings


def remains(root: Path) -> list[str]:
    """Every file that still holds a piece, read byte by byte, unpacked, escapes resolved."""
    found = []
    for file in (f for f in root.rglob("*") if f.is_file()):
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        text = data.decode("utf-8", "replace")
        text += text.encode("latin-1", "replace").decode("unicode_escape", "replace")
        found += [f"{file.relative_to(root)}: {piece}" for piece in PIECES if piece.lower() in text.lower()]
    return found


@pytest.mark.parametrize("how", [{"subject": WHO}, {"subject": NAME}, {"row_id": "req-77"}, {"row_id": "p-000777"}, {"row_id": "dev-0123"}])
def test_nothing_is_left_in_any_file(project, how):
    """Guards against a deletion that forgets a cache, an archive, a report, a torn line or the tombstone itself."""
    root = project.root
    before = {name: (root / name).read_bytes() for name in ("data/eval/test.jsonl", "project.yaml")}
    assert len({place.split(":")[0] for place in remains(root)}) >= 18
    found = plan(project, **how)
    assert len({place.split(":")[0] for place in remains(root)}) >= 18  # a plan changes nothing
    record = forget(project, found)
    assert remains(root) == []
    assert {*record["rows"]} >= {"p-000777", "dev-0123", "req-77"} and not (root / PENDING).exists()
    assert [json.loads(line)["id"] for line in (root / "data/accepted/all.jsonl").open()] == [f"t-{n:04d}" for n in range(6)]
    assert [json.loads(line)["request_id"] for line in (root / "data/raw/requests.jsonl.1").open()] == ["req-78"]
    assert all((root / name).read_bytes() == content for name, content in before.items())
    for name in ("eval_report.json", "eval_report.md", "eval_report.html"):
        assert OTHER in (root / f"outputs/eval_reports/mine/{name}").read_text()
    cells = json.loads((root / "outputs/runs/mine/notebooks/06_evaluate.ipynb").read_text())["cells"]
    assert [bool(cell["outputs"]) for cell in cells] == [False, False, True] and all(cell["source"] for cell in cells)
    assert len(registry.read(project, "runs")) == 3


def test_what_was_trained_on_it_is_named_and_not_released(project, monkeypatch):
    """Guards against a model that goes out with what it learnt from a row that had to go, and against refusing others."""
    record = forget(project, plan(project, WHO))
    version = registry.latest(project, "datasets", rows=7)["version"]
    assert record["datasets"] == [version] and record["runs"] == ["mine"]
    assert record["models"] == ["outputs/adapters/mine", "outputs/gguf/mine/model-q8_0.gguf"]
    with pytest.raises(SlmError, match="run mine: it was trained on rows that were forgotten"):
        check(project, "mine")
    with pytest.raises(SlmError, match="no evaluation report"):
        check(project, "other")
    monkeypatch.setattr(registry, "read", lambda settings, name, read=registry.read: [
        {**r, "at": "9999"} if r.get("run_id") == "mine" else r for r in read(settings, name)])  # fmt: skip
    with pytest.raises(SlmError, match="evaluated on another"):  # trained again since: the next check speaks
        check(project, "mine")


def test_a_version_whose_rows_are_not_here_counts_when_its_sources_held_the_row(project):
    """Guards against an innocent look because git left the archive out."""
    version = registry.latest(project, "datasets", rows=7)["version"]
    (project.root / f"registry/datasets/{version}.jsonl.gz").unlink()
    assert plan(project, WHO).datasets == [version]


def test_a_changed_evaluation_set_is_locked_anew_and_recorded(project):
    """Guards against a locked set that can never be opened again, or that compares with what it was."""
    old = registry.check_locked(project)
    record = forget(project, plan(project, WHO))
    new = registry.check_locked(project)
    assert record["relocked"] == {"dev": [old["dev"], new["dev"]]} and old["dev"] != new["dev"] and old["test"] == new["test"]


def test_a_deletion_that_was_cut_off_goes_on(project, monkeypatch):
    """Guards against half a deletion that nobody can finish, because the row that it looked for is gone already."""
    clean, seen = deletion._clean, []

    def killed(settings, path, found):
        seen.append(path)
        if len(seen) > 12:
            raise KeyboardInterrupt
        return clean(settings, path, found)

    monkeypatch.setattr(deletion, "_clean", killed)
    with pytest.raises(KeyboardInterrupt):
        forget(project, plan(project, WHO))
    monkeypatch.undo()
    with pytest.raises(SlmError, match="cut off"):
        check(project, "other")
    record = forget(project, plan(project))
    assert remains(project.root) == [] and record["runs"] == ["mine"]


def test_what_it_may_not_write_is_named_and_the_deletion_stays_open(project):
    """Guards against "deleted" while the row stands in a prompt, a notebook or a database that nothing cleans."""
    write_text(project.root / "task/prompts.py", f"EXAMPLE = '''{TEXT}'''\n")
    (project.root / "data/notes.db").write_bytes(b"\0\1" + NAME.encode() + b"\0")
    with pytest.raises(SlmError, match=r"still in data/notes\.db, task/prompts\.py") as told:
        forget(project, plan(project, NAME))
    assert "Brand" not in str(told.value) and (project.root / PENDING).exists()
    for name in ("task/prompts.py", "data/notes.db"):
        (project.root / name).unlink()
    forget(project, plan(project))
    assert remains(project.root) == []


@pytest.mark.parametrize("how", [{"subject": "Nobody Atall"}, {"row_id": "p-999"}, {"subject": "ab"}, {}, {"subject": WHO, "row_id": "x"}])
def test_a_subject_that_does_not_exist_is_a_clear_line(project, how):
    """Guards against a traceback, a silent success, and a name in an error message."""
    before = {f: f.read_bytes() for f in project.root.rglob("*") if f.is_file()}
    with pytest.raises(SlmError, match="forget: ") as told:
        plan(project, **how)
    assert "Nobody" not in str(told.value) and {f: f.read_bytes() for f in project.root.rglob("*") if f.is_file()} == before


def test_what_was_forgotten_does_not_come_back(project):
    """Guards against a backup of the logs that brings a deleted row into the next dataset."""
    forget(project, plan(project, WHO))
    assert read_decisions(project)["p-000777"].decision == "reject"


def test_the_command_shows_asks_and_never_names(project, monkeypatch):
    """Guards against a deletion by a slip, and against a name on the screen or in the shell's history."""
    monkeypatch.chdir(project.root)
    told = CliRunner().invoke(cli.app, ["forget", "--subject", "-"], input=f"{NAME}\nn\n")
    assert told.exit_code == 1 and "nothing was changed" in str(told.exception) and "run mine was trained" in told.stdout
    done = CliRunner().invoke(cli.app, ["forget", "--subject", "-", "--yes"], input=f"{NAME}\n")
    assert done.exit_code == 0, done.output
    assert "run 02 and 06 again" in done.stdout and "Imke" not in told.stdout + done.stdout and remains(project.root) == []
