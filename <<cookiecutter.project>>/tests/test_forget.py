"""Deletion: nothing of a person is left in any file, what was trained on it is named, and nothing else is touched."""

import gzip
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from typer.testing import CliRunner

from slm import cli, registry
from slm.curate.decisions import read_decisions
from slm.curate.versions import record_dataset
from slm.errors import SlmError
from slm.evaluate.release import check
from slm.generate.teacher import Job, Store
from slm.production import forget as deletion
from slm.production.erase import Content
from slm.production.forget import PENDING, forget, plan, telling, told
from slm.repair.causes import Finding
from slm.repair.clusters import Cell
from slm.repair.plan import Item, Plan, request
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
    write_text(root / "specs/generation_prompts/generation_prompt.md", f"# Prompt\n\n{TEXT}\n")
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
    clean, seen = deletion.clean, []

    def killed(path, name, found):
        seen.append(path)
        if len(seen) > 12:
            raise KeyboardInterrupt
        return clean(path, name, found)

    monkeypatch.setattr(deletion, "clean", killed)
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


def test_what_a_row_alone_tells_goes_and_common_values_stay(project):
    """Guards against an order number that stands on in a table that names neither the row nor its text, and against a
    label, a date or somebody else's number that is blacked out with it."""
    said = "call me at imke@toepferei.example or 0170 5551234 by 2026-12-24, 16:30, about TL-61834 and TL-40000, high billing, Gasse 7 B"
    answer = json.dumps({"label": "billing", "priority": "high", "order": "TL-61834", "date": "2026-12-24", "phone": 5551234, "street": "Gasse 7 B"})
    mine = make_row(said, answer, id="p-000900", category="leak")
    shared = make_row("and I wait for TL-40000", '{"label":"billing"}', id="t-0900", category="bug")
    append_jsonl(project.root / "data/generated/production.jsonl", [one.model_dump(exclude_none=True) for one in (mine, shared)])
    table = [{"row": "a", "parsed": {"order": "TL-61834", "phone": 5551234, "label": "billing", "priority": "high", "date": "2026-12-24"}}]
    write_json(project.root / "outputs/eval_reports/mine/confusion.json", {"rows": table, "counts": {"TL-61834": 2, "high": 3}, "n": 16})
    write_text(project.root / "outputs/eval_reports/mine/wrong.csv", "x,tl 61834,1\nx,TL-40000,2\nx,Imke@Toepferei.example,3\nx,gasse 7 b,4\nx,high,5\n")
    found = plan(project, row_id="p-000900")
    assert {*found.values} == {"imke@toepferei.example", "0170 5551234", "5551234", "Gasse 7 B"} and found.ids == ["p-000900"]  # TL-61834: Imke's, too
    forget(project, plan(project, NAME))
    found = plan(project, row_id="p-000900")
    assert {*found.values} == {"imke@toepferei.example", "0170 5551234", "5551234", "TL-61834", "Gasse 7 B"}
    assert not any(value in told(found) for value in found.values)
    forget(project, found)
    left = json.loads((project.root / "outputs/eval_reports/mine/confusion.json").read_text())
    parsed = {"order": "[FORGOTTEN]", "phone": None, "label": "billing", "priority": "high", "date": "2026-12-24"}
    assert left == {"rows": [{"row": "a", "parsed": parsed}], "counts": {"high": 3}, "n": 16}
    gone = "[FORGOTTEN]"
    assert (project.root / "outputs/eval_reports/mine/wrong.csv").read_text().split("\n") == [gone, "x,TL-40000,2", gone, gone, "x,high,5", ""]
    assert "t-0900" in (project.root / "data/generated/production.jsonl").read_text()


@pytest.mark.parametrize(("said", "answer", "tells"), [
    ("order tl 6 1 8 3 4, please", '{"order": "TL-61834", "label": "order"}', {"TL-61834"}),
    ("I am Imke Brand from Rome", '{"name": "Imke Brand", "city": "Rome", "label": "how_to"}', {"Imke Brand"}),
    ("high, on 12.11.2026 at 16:30, item 42", '{"priority": "high", "at": "16:30", "day": "2026-11-12", "n": 42}', set()),
    ("billing of AB-12345", "no JSON", {"AB-12345"}),
    ("nothing of it", '{"order": "TL-61834", "name": "Ann Other"}', set()),
])  # fmt: skip
def test_values_that_identify_stand_in_the_message(said, answer, tells):
    """Guards against a rule that blacks out labels, dates and what a model made up, or that misses a spelt number."""
    assert telling(make_row(said, answer, category="x").model_dump()) == tells


@pytest.mark.parametrize(("subject", "text", "there"), [
    ("O'Brien & Co", "<td>O&#39;Brien &amp; Co</td>", True), ("佐藤花子", "こちらは佐藤花子です", True), ("Ann Lee", "ann\\nlee", True),
    ("Jürgen Öz", r"{\"a\": \"J\\u00fcrgen \u00d6z\"}", True), ("Ann Lee", json.dumps("<a\nAnn Lee> <i>"), True),
    ("Ann Lee", "Joann Lee", False), ("61834", "loss 0.61834", False),
])  # fmt: skip
def test_a_subject_is_found_however_it_is_written(subject, text, there):
    """Guards against a name that stays because HTML, JSON or a language without spaces writes it in another way."""
    assert Content(ids=[], subject=subject).holds(text) is there


KILLED = """import os, sqlite3, sys
file, mode, text, end = sys.argv[1:]
db = sqlite3.connect(file)
db.execute(f"PRAGMA journal_mode = {mode}")
db.execute("PRAGMA cache_size = 1")
db.execute("INSERT INTO replies VALUES (NULL, 'w', ?, 'x', 0)", (text * 50,))
db.execute(end)
db.execute("UPDATE replies SET job = job || ' '")
os._exit(0)"""


@pytest.mark.parametrize(("mode", "end", "side"), [("WAL", "COMMIT", "-wal"), ("DELETE", "SELECT 1", "-journal")])
def test_of_the_teachers_cache_only_its_entries_go_to_the_last_byte(project, mode, end, side):
    """Guards against paid replies that are lost with one, and against text in free pages and in what a killed run left."""
    file, made = project.root / ".cache/teacher.sqlite", {"meta": {"provenance": {"teacher": "t"}}}
    file.unlink()
    store = Store(project)
    for n in range(40):
        store.put(Job(f"k{n}", f"rows like: {TEXT if n == 7 else OTHER} {n}", 9, made), "TL-61834" if n == 9 else f"reply {n}")
        store.put(Job("old", TEXT * 9, 9, made), "x")
    store.db.execute("DELETE FROM replies WHERE key = 'old'")  # its text stays in free pages
    store.db.commit()
    store.db.close()
    subprocess.run([sys.executable, "-c", KILLED, file, mode, TEXT, end], check=True)
    assert all(b"the pottery" in data for data in (file.read_bytes(), Path(f"{file}{side}").read_bytes()))
    forget(project, plan(project, NAME))
    assert remains(project.root) == [] and [f.name for f in file.parent.glob("teacher.sqlite*")] == ["teacher.sqlite"]
    store = Store(project)
    assert store.get("k7") == store.get("k9") == store.get("w") == [] and store.get("k8") == ["reply 8"]
    assert len(store.unused()) == 38
    store.db.close()


def test_rows_written_from_it_are_named_and_go_where_they_quote_it(project):
    """Guards against a twin of a deleted row that nobody is told of, and against a release refused for it."""
    plan_file = Item(
        name="c", cause="wrong label", rows=20, cells=[Cell(situation="x", category="leak", kind="style", difficulty="easy", rows=20)],
        findings=[Finding(row_id="dev-0123", cause="wrong label", evidence="x", blame="data", label="leak", kind="style", difficulty="easy")],
    )  # fmt: skip
    asked = request(plan_file, plan_file.cells[0]).id
    write_json(project.root / "outputs/runs/mine/repair_plan.json", Plan.model_construct(run_id="m", contract="c", items=[plan_file]).model_dump())
    made = {"shown": {"parents": ["t-0001", "p-000777"]}, "repair": {"request": asked}, "twin": {"contrast_of": "p-000777"}, "none": {"parents": ["t-0001"]}}
    rows = [make_row(f"something of its own {n}", '{"label":"leak"}', id=n, category="leak", provenance=p) for n, p in made.items()]
    quote = make_row("so our shift list is public on the net", '{"label":"leak"}', id="quote", category="leak", provenance=made["shown"])
    write_rows(project.root / "data/generated/batch_001.jsonl", [*rows, quote])
    write_rows(project.root / "data/accepted/all.jsonl", rows)
    record_dataset(project, project.root / "data/accepted/all.jsonl", {"rows": {}, "files": {}}, ["data/generated/batch_001.jsonl"], [])
    version = registry.latest(project, "datasets", rows=4)["version"]
    registry.append(project, "runs", {"stage": "train", "status": "completed", "recipe": {}, "run_id": "later", "parents": {"dataset": version}})
    found = plan(project, WHO)
    assert found.derived == ["repair", "shown", "twin"] and "3 rows written from them (repair, shown, twin)" in told(found)
    record = forget(project, found)
    assert record["derived"] == found.derived and record["derived_datasets"] == [version] and record["derived_runs"] == ["later"]
    assert record["runs"] == ["mine"] and "quote" in record["rows"]
    assert [json.loads(line)["id"] for line in (project.root / "data/generated/batch_001.jsonl").open()] == [*made]
    with pytest.raises(SlmError, match="no evaluation report"):
        check(project, "later")


@pytest.mark.parametrize("busy", [".cache/locks/teacher.lock", ".cache/locks/forget.lock", "outputs/runs/mine/.lock"])
def test_a_run_at_work_is_not_raced(project, monkeypatch, busy):
    """Guards against a run that writes the row again after the search, and against two deletions in one another."""
    monkeypatch.setattr(deletion, "WAIT", 0)
    (project.root / busy).parent.mkdir(parents=True, exist_ok=True)
    (project.root / busy).touch()
    with FileLock(project.root / busy), pytest.raises(SlmError, match=r"at work here; .* Nothing was changed"):
        forget(project, plan(project, WHO))
    assert not (project.root / PENDING).exists() and len(remains(project.root)) > 18
    forget(project, plan(project, WHO))
    assert remains(project.root) == []


def test_another_deletion_does_not_take_the_place_of_one_that_was_cut_off(project):
    """Guards against "deleted" for a person whose rows all stand there, because another's plan was finished."""
    write_text(project.root / PENDING, plan(project, WHO).model_dump_json())
    for how in ({"subject": "Nobody Atall"}, {"row_id": "t-0001"}):
        with pytest.raises(SlmError, match="another deletion is at work or was cut off") as told:
            plan(project, **how)
        assert "Nobody" not in str(told.value)
    assert plan(project, WHO).ids == plan(project, row_id="p-000777").ids == plan(project).ids


def test_a_file_that_cannot_be_read_or_written_is_named_and_the_deletion_stays_open(project, monkeypatch):
    """Guards against a traceback with the row's text in it, and against "deleted" where a file was skipped."""
    broken = project.root / "registry/datasets/broken.jsonl.gz"
    broken.write_bytes(gzip.compress(TEXT.encode())[:-9])
    with pytest.raises(SlmError, match=r"broken\.jsonl\.gz: cannot be read .* run forget again"):
        plan(project, WHO)
    broken.unlink()
    found = plan(project, WHO)
    with sqlite3.connect(project.root / ".cache/teacher.sqlite") as db:
        db.execute("BEGIN EXCLUSIVE")
        monkeypatch.setattr(sqlite3, "connect", lambda path, timeout, connect=sqlite3.connect: connect(path, timeout=0))
        with pytest.raises(SlmError, match=r"teacher\.sqlite: cannot be cleaned \(database is locked\)"):
            forget(project, found)
    db.close()

    def full(old, new):
        raise OSError(28, "No space left on device", str(old))

    with monkeypatch.context() as patch, pytest.raises(SlmError, match=r"data/accepted/all\.jsonl: No space left") as said:
        patch.setattr("slm.rows.os.replace", lambda old, new, own=os.replace: full(old, new) if "all.jsonl" in str(new) else own(old, new))
        forget(project, found)
    assert "Imke" not in str(said.value) and (project.root / PENDING).exists()
    forget(project, plan(project))
    assert remains(project.root) == []
