"""03: the plan, the recorded teacher, and a real HTTP teacher that misbehaves."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal

import pytest
from pydantic import BaseModel, ConfigDict

from slm import cost
from slm.contract import Contract
from slm.curate.gates import restricted
from slm.errors import SlmError
from slm.generate import (
    Request, acceptance, estimate, feasibility, generate, grid, label_values, languages, plan, spending, teacher,
)  # fmt: skip
from slm.generate.importer import import_rows
from slm.generate.plan import quotas
from slm.generate.salvage import objects, rows_from
from slm.models import openai_api
from slm.rows import make_row, read_rows, write_jsonl, write_rows
from slm.settings import load_settings

ROOT = Path(__file__).resolve().parents[1]


class Label(BaseModel):
    model_config = ConfigDict(extra="forbid")
    label: Literal["a", "b"]


CONTRACT = Contract(
    name="t", task_type="classification", output=Label, system_prompt="Label it.", primary_metric="exact_match", target=0.9,
    label_field="label",
)  # fmt: skip


def prompt(contract, request, seeds):
    return f"want {request.rows} {request.category} {request.kind} {request.difficulty} {request.note}"


class Server(ThreadingHTTPServer):
    """Speaks /v1/chat/completions; `script` holds what to do for the next calls, then it answers properly."""

    daemon_threads, request_queue_size = True, 128

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.prompts, self.times, self.lock, self.count = [], [], [], threading.Lock(), 0
        self.delay = 0.0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


def completion(content):
    usage = {"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150}
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        self.server.times.append(time.monotonic())
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if "locked" in self.path:
            return self.reply(403, {"error": {"message": "no entry"}})
        text = body["messages"][-1]["content"]
        with self.server.lock:
            self.server.prompts.append(text)
            step = self.server.script.pop(0) if self.server.script else None
            self.server.count += 1
            serial = self.server.count
        time.sleep(self.server.delay)
        if isinstance(step, int):
            return self.reply(step, {"error": {"message": "no"}}, {"retry-after": "0"})
        if step == "hang":
            time.sleep(3)
            return None
        if step == "cut":
            self.send_response(200)
            self.send_header("content-length", "999")
            self.end_headers()
            self.wfile.write(b'{"choices": [')
            self.close_connection = True
            return None
        if not text.startswith("want "):  # a row of the evaluation set: the label is its last word
            content = f'Sure:\n```json\n{{"label": "{text.split()[-1]}"}}\n```' if step is None else step(text)
            return self.reply(200, completion(content))
        _, n, category, *_ = text.split()
        line = '{{"input": "message {0} of call {1} says hello", "output": {{"label": "{2}"}}, "group": "g{1}-{0}"}}'
        content = "\n".join(line.format(i, serial, category) for i in range(int(n)))
        if callable(step):
            content = step(content)
        self.reply(200, completion(content))

    def reply(self, status, body, headers=()):
        data = json.dumps(body).encode()
        try:
            self.send_response(status)
            for name, value in dict(headers).items():
                self.send_header(name, value)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except OSError:
            pass

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    one = Server()
    yield one
    one.shutdown()
    one.server_close()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(openai_api, "BACKOFF_S", 0.01)


def project(tmp_path, url="", **generate_settings):
    """A project folder with three seed rows and settings for the teacher at `url`."""
    (tmp_path / "project.yaml").write_text("project: {name: t}\n")
    (tmp_path / "training/configs").mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "training/configs/train_config.yaml", tmp_path / "training/configs")
    seeds = [make_row(f"seed {i} text", '{"label":"a"}', category="a") for i in range(3)]
    write_rows(tmp_path / "data/raw/seed.jsonl", seeds)
    endpoint = {"url": url, "model": "m", "timeout_s": 20, "retries": 2, "concurrency": 3}
    endpoint |= generate_settings.pop("endpoint", {})
    overrides = {"teacher": "openai", "endpoint": endpoint, "rows_target": 12, "batch_rows": 5, **generate_settings}
    return load_settings(overrides={"generate": overrides}, start=tmp_path)


ASK = [Request("a", "canonical", "easy", 5)]


def test_quotas_add_up_and_touch_every_category(tmp_path):
    """A small target that rounds every cell to zero, or to one category only."""
    settings = project(tmp_path, rows_target=13)
    wanted = quotas(settings, CONTRACT)
    assert sum(wanted.values()) == 13
    assert {cell[0] for cell, n in wanted.items() if n} == {"a", "b"}


def test_labels_of_a_union_of_tools_are_found():
    """A contract whose label is a constant in each branch of a union, as in tool calling."""
    spec = {"anyOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}], "$defs": {
        "A": {"properties": {"tool": {"const": "x"}, "arguments": {"$ref": "#/$defs/C"}}},
        "B": {"properties": {"tool": {"enum": ["y"]}}}, "C": {"properties": {"channel": {"enum": ["sms"]}}}}}  # fmt: skip

    class Fake:
        label_field, schema = "tool", spec

    assert label_values(Fake) == ["x", "y"]


def test_plan_asks_only_for_what_is_missing(tmp_path):
    """Paying twice for rows that are already there, or counting refused rows as held."""
    settings = project(tmp_path)
    before = plan(settings, CONTRACT)
    cell = before[0]
    row = make_row("some held row", '{"label":"a"}', category=cell.category, kind=cell.kind, difficulty=cell.difficulty)
    write_rows(tmp_path / "data/generated/batch_001.jsonl", [row])
    assert sum(r.rows for r in plan(settings, CONTRACT)) == 11
    assert grid(settings, CONTRACT).loc["all", "held"] == 1
    write_jsonl(tmp_path / "data/rejected/batch_001.jsonl", [{"gate": "trivial", "row": row.model_dump()}])
    assert sum(r.rows for r in plan(settings, CONTRACT)) == 12


def test_recorded_teacher_hands_out_each_row_once(tmp_path):
    """A second run that repeats rows, or a limit that leaves a category out."""
    settings = project(tmp_path, teacher="recorded")
    rows = [make_row(f"recorded {i} in {c}", "{}", category=c, source="teacher") for c in "ab" for i in range(10)]
    write_rows(tmp_path / "data/raw/recorded_teacher.jsonl", rows)
    some = generate(settings, CONTRACT, prompt, limit=4)
    assert {r.meta.category for r in some.rows} == {"a", "b"} and len(some.rows) == 4
    rest = generate(settings, CONTRACT, prompt)
    assert rest.batch.name == "batch_002.jsonl" and len(rest.rows) == 16
    assert {r.meta.provenance["teacher"] for r in rest.rows} == {"recorded"}
    assert generate(settings, CONTRACT, prompt).batch is None


def test_http_teacher_fills_the_plan_with_provenance_and_ledger(tmp_path, server):
    """Rows without a trail, or calls that cost money and leave no line."""
    settings = project(tmp_path, server.url, endpoint={"usd_per_1m_input": 1.0, "usd_per_1m_output": 2.0})
    result = generate(settings, CONTRACT, prompt)
    assert len(result.rows) == 12 and result.calls == len(server.prompts)
    stored = read_rows(result.batch)
    assert {"batch", "teacher", "prompt", "request", "parents"} <= stored[0].meta.provenance.keys()
    assert all(json.loads(r.answer)["label"] == r.meta.category for r in stored)
    line = cost.entries(settings)[0]
    assert line["tokens_in"] == 100 and line["money"] == pytest.approx(200 / 1e6)
    assert plan(settings, CONTRACT) == [] and generate(settings, CONTRACT, prompt).calls == 0


def test_429_and_500_are_retried_then_succeed(tmp_path, server):
    """A refused call that loses its rows."""
    server.script = [429, 500]
    result = generate(project(tmp_path, server.url), CONTRACT, prompt, ASK)
    assert len(result.rows) == 5 and result.calls == 3 and not result.failed


def test_timeout_is_retried_and_counted_in_full(tmp_path, server):
    """A hanging endpoint that stops the run, or a paid call missing from the ledger."""
    server.script = ["hang"]
    settings = project(tmp_path, server.url, endpoint={"usd_per_1m_output": 1.0, "timeout_s": 1, "retries": 9})
    result = generate(settings, CONTRACT, prompt, ASK)
    assert len(result.rows) == 5
    assert any("timed out" in line.get("note", "") for line in cost.entries(settings))


def test_wrong_key_stops_with_one_sentence(tmp_path, server):
    """A 401 that is retried for minutes, or shown as a traceback of the client."""
    server.script = [401] * 9
    with pytest.raises(SlmError, match="HTTP 401.*OPENAI_API_KEY"):
        generate(project(tmp_path, server.url), CONTRACT, prompt, ASK)
    assert len(server.prompts) <= 3


def test_dead_endpoint_stops_and_says_so(tmp_path):
    """A run that hammers a port where nobody listens, once per cell."""
    settings = project(tmp_path, "http://127.0.0.1:9/v1", endpoint={"concurrency": 1, "retries": 0})
    result = generate(settings, CONTRACT, prompt)
    assert "calls in a row: 3" in result.stopped and result.calls == 3


def test_cut_off_jsonl_is_salvaged_and_asked_again(tmp_path, server):
    """One broken line that throws away a whole reply, or vanishes without a trace."""
    server.script = [lambda text: "Here you go:\n```json\n" + text[:-25]]
    settings = project(tmp_path, server.url)
    result = generate(settings, CONTRACT, prompt, ASK)
    assert len(result.rows) == 5 and result.calls == 2
    assert [reason for reason, _ in result.unread] == ["prose around the rows", "cut off"]
    assert "cut off" in result.batch.with_suffix(".unread.txt").read_text()


def test_budget_is_never_passed(tmp_path, server):
    """A bill above the limit because calls in flight were not counted."""
    prices = {"usd_per_1m_input": 0.0, "usd_per_1m_output": 1000.0, "concurrency": 8}  # 1.70 at worst, 0.05 in fact
    settings = project(tmp_path, server.url, endpoint=prices, budget_usd=2.0, rows_target=200)
    result = generate(settings, CONTRACT, prompt)
    assert "budget" in result.stopped and 0 < cost.spent(settings) <= 2.0
    assert result.calls > 1
    generate(settings, CONTRACT, prompt)
    assert cost.spent(settings) <= 2.0


def test_killed_run_goes_on_and_asks_nothing_twice(tmp_path, server):
    """Paying again for replies that had arrived before the kill."""
    project(tmp_path, server.url)
    server.delay = 0.15
    code = f"""
        import sys; sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]
        from pathlib import Path
        import test_generate as t
        t.generate(t.project(Path({str(tmp_path)!r}), {server.url!r}, endpoint={{"concurrency": 1}}), t.CONTRACT, t.prompt)
    """
    run = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stderr=subprocess.DEVNULL)
    batch = tmp_path / "data/generated/batch_001.jsonl"
    end = time.time() + 240
    while time.time() < end and not (batch.exists() and batch.read_text().count("\n") >= 3):
        time.sleep(0.02)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    server.delay = 0.0
    time.sleep(0.3)
    first = len(read_rows(batch))
    assert first >= 3
    result = generate(project(tmp_path, server.url), CONTRACT, prompt)
    assert first + len(result.rows) == 12
    # At most the one call that was in flight when the run died is asked again.
    assert len(server.prompts) - len(set(server.prompts)) <= 1


def test_reply_stored_but_not_written_is_used(tmp_path, server):
    """A kill between the answer's arrival and the batch file."""
    settings = project(tmp_path, server.url)
    store = teacher.Store(settings)
    meta = {"category": "a", "kind": "canonical", "difficulty": "easy", "provenance": {"request": ASK[0].id, "teacher": "m"}}
    text = "\n".join(json.dumps({"input": f"kept message {i}", "output": {"label": "a"}}) for i in range(5))
    store.put(teacher.Job("k", "p", 9, {"meta": meta, "rows": 5}), text)
    result = generate(settings, CONTRACT, prompt, ASK)
    assert len(result.rows) == 5 and result.calls == 0 and result.reused == 1


def test_salvage_reads_arrays_fences_and_pretty_printing():
    """A teacher that answers in its own favourite wrapping."""
    assert objects('[{"a": 1},\n {"a": 2}]') == ([{"a": 1}, {"a": 2}], [])
    assert objects('```jsonl\n{"a": 1}\n```') == ([{"a": 1}], [])
    assert objects('{\n  "a": {"b": 1}\n}') == ([{"a": {"b": 1}}], [])
    good, bad = rows_from('{"input": 5, "output": "x"}\n{"messages": []}', {"category": "a"})
    assert good == [] and len(bad) == 2


def test_salvage_keeps_the_neighbours_of_a_broken_row():
    """One bad object in an array on one line that takes the good ones after it along."""
    good, bad = objects('[{"input": "1"}, {"input": "2", "output": oops}, {"input": "3"}]')
    assert good == [{"input": "1"}, {"input": "3"}] and len(bad) == 1 and "oops" in bad[0][1]
    good, bad = objects('{\n "input": "1",\n "output": {"a": x}\n}\n{"group": "g", "input": "2\nlines"}')
    assert good == [{"group": "g", "input": "2\nlines"}] and len(bad) == 1
    assert rows_from("", {})[1] == [("an empty reply", "")]


def test_half_an_emoji_does_not_stop_the_run(tmp_path, server):
    """A surrogate that no file can hold: the paid reply would crash this run, and every run after it."""
    server.script = [lambda text: '{"input": "bad \\ud83d", "output": {"label": "a"}}\n' + text]
    result = generate(project(tmp_path, server.url), CONTRACT, prompt, ASK)
    assert len(result.rows) == 5 and len(result.unread) == 1


def test_languages_follow_the_seed_rows_or_the_settings(tmp_path):
    """A grid that is filled in one language, or a rare language that rounding leaves out."""
    settings = project(tmp_path, rows_target=100)
    seeds = [make_row(f"s {i}", '{"label":"a"}', category="a", language="de" if i < 2 else "en") for i in range(10)]
    write_rows(tmp_path / "data/raw/seed.jsonl", seeds)
    assert languages(settings) == {"de": 0.2, "en": 0.8}
    assert grid(settings, CONTRACT, "language").loc["de", "wanted"] == 20
    settings = project(tmp_path, rows_target=50, languages={"en": 6, "fr": 3, "sw": 1})
    wanted = quotas(settings, CONTRACT)
    for label in "ab":
        share = {
            name: sum(n for cell, n in wanted.items() if cell[0] == label and cell[3] == name) for name in ("en", "fr", "sw")
        }
        assert abs(share["en"] - 15) <= 1 and abs(share["fr"] - 7.5) <= 1 and 2 <= share["sw"] <= 3
    assert {r.language for r in plan(settings, CONTRACT)} == {"en", "fr", "sw"}
    with pytest.raises(SlmError, match="generate.languages"):
        languages(project(tmp_path, languages={"en": 0}))


def test_the_language_of_a_row_is_what_was_written(tmp_path):
    """ "en-GB" as a language of its own, or an Italian row lost to "other"."""
    line = json.dumps({"input": "ciao a tutti", "output": {"label": "a"}, "language": "it-IT"})
    assert rows_from(line, {"category": "a", "language": "en"})[0][0].meta.language == "it"
    assert rows_from(line, {"category": "a", "language": "other"})[0][0].meta.language == "other"


def test_teachers_share_the_calls_and_are_compared(tmp_path, server):
    """A comparison on different cells, or rows whose teacher and prompt nobody can name."""
    other = {"url": server.url, "model": "m2"}
    settings = project(tmp_path, server.url, endpoints=[other], rows_target=60)
    result = generate(settings, CONTRACT, prompt)
    made = [r.meta.provenance for r in result.rows]
    counts = {name: sum(p["teacher"] == name for p in made) for name in ("m", "m2")}
    assert sum(counts.values()) == 60 and min(counts.values()) >= 15
    assert len({p["prompt_version"] for p in made}) == 1 and len({p["prompt"] for p in made}) > 10
    assert acceptance(settings).empty
    kept = [r for r in result.rows if r.meta.provenance["teacher"] == "m"]
    write_rows(tmp_path / "data/accepted/all.jsonl", kept)
    refused = [{"gate": "trivial", "row": r.model_dump()} for r in result.rows if r not in kept]
    write_jsonl(tmp_path / "data/rejected/batch_001.jsonl", refused)
    table = acceptance(settings, "teacher").set_index("teacher")
    assert table.loc["m", "rate"] == 1 and table.loc["m2", "rate"] == 0 and table.loc["m2", "refused"] == counts["m2"]
    assert set(spending(settings)["model"]) == {"m", "m2"} and spending(settings)["calls"].sum() >= 48


def test_a_dead_teacher_leaves_its_calls_to_the_others(tmp_path, server):
    """One endpoint that is down and stops a run that another could finish."""
    dead = {"url": "http://127.0.0.1:9/v1", "model": "dead", "retries": 0}
    result = generate(project(tmp_path, server.url, endpoints=[dead], rows_target=40), CONTRACT, prompt)
    assert len(result.rows) == 40 and "dead" in result.stopped


def test_a_refused_teacher_lets_the_others_finish(tmp_path, server):
    """A wrong key of one teacher that throws away what another is being paid for."""
    bad = {"url": server.url.replace("/v1", "/locked"), "model": "bad", "api_key_env": "LOCKED_KEY"}
    settings = project(tmp_path, server.url, endpoints=[bad], rows_target=40)
    with pytest.raises(SlmError, match="HTTP 403.*LOCKED_KEY.*no entry"):
        generate(settings, CONTRACT, prompt)
    rows = read_rows(tmp_path / "data/generated/batch_001.jsonl")
    assert len(rows) >= 10 and {r.meta.provenance["teacher"] for r in rows} == {"m"}


def test_unread_lines_count_against_the_teacher(tmp_path, server):
    """A teacher that looks perfect because what it botched is left out."""
    server.script = [lambda text: text + '\n{"input": "x", "output": nonsense}']
    settings = project(tmp_path, server.url)
    result = generate(settings, CONTRACT, prompt, ASK)
    write_rows(tmp_path / "data/accepted/all.jsonl", result.rows)
    assert acceptance(settings, "teacher")[["written", "accepted", "unread"]].values.tolist() == [[6, 5, 1]]


def test_requests_per_minute_are_kept(tmp_path, server):
    """A burst that a provider answers with 429, or with a blocked key."""
    settings = project(tmp_path, server.url, batch_rows=1, endpoint={"requests_per_minute": 120, "concurrency": 8})
    begin = time.monotonic()  # from here: a first request that arrives late makes the gaps after it short
    generate(settings, CONTRACT, prompt, ASK)
    waited = [at - begin for at in sorted(server.times)]
    assert len(waited) == 5 and all(at >= 0.499 * n for n, at in enumerate(waited))


def test_estimate_asks_nothing_and_bounds_the_bill(tmp_path, server):
    """A dry run that costs money, or a worst case that is passed."""
    settings = project(tmp_path, server.url, endpoint={"usd_per_1m_input": 1.0, "usd_per_1m_output": 2.0})
    table = estimate(settings, CONTRACT, prompt)
    assert not server.prompts and table.loc["m", "rows"] == 12 and table.loc["m", "budget_left"] == 5
    result = generate(settings, CONTRACT, prompt)
    assert result.calls == table.loc["m", "calls"] and 0 < result.money <= table.loc["m", "at_most"]
    assert estimate(settings, CONTRACT, prompt).loc["m", "calls"] == 0


def test_two_runs_at_once_are_refused(tmp_path, server):
    """Two runs that pay for the same cells and write into one batch file."""
    settings = project(tmp_path, server.url)
    with teacher.Purse(settings), pytest.raises(SlmError, match="another run"):
        generate(settings, CONTRACT, prompt)
    assert not server.prompts and len(generate(settings, CONTRACT, prompt).rows) == 12


def test_calls_in_flight_at_a_kill_are_booked_in_full(tmp_path, server):
    """A budget that forgets what a killed run had asked for, run after run."""
    import asyncio

    settings = project(tmp_path, server.url, endpoint={"usd_per_1m_output": 1000.0}, budget_usd=2.0)
    with teacher.Purse(settings) as purse:
        assert asyncio.run(purse.reserve(settings.generate.endpoint, 10, 1500))
    with teacher.Purse(settings) as purse:
        assert purse.spent == pytest.approx(1.5) and "in flight" in cost.entries(settings)[0]["note"]
        assert asyncio.run(purse.reserve(settings.generate.endpoint, 10, 1500)) is None
    with teacher.Purse(settings) as purse:
        assert purse.spent == pytest.approx(1.5)


def test_a_cut_reply_is_counted_and_a_refused_connection_is_not(tmp_path, server):
    """Money that a provider takes for a reply that broke off, and money booked for an endpoint that was never reached."""
    prices = {"usd_per_1m_output": 1.0}
    server.script = ["cut"]
    settings = project(tmp_path, server.url, endpoint=prices)
    assert len(generate(settings, CONTRACT, prompt, ASK).rows) == 5
    assert [bool(line.get("note")) for line in cost.entries(settings)] == [True, False]
    (tmp_path / "dead").mkdir()
    settings = project(tmp_path / "dead", "http://127.0.0.1:9/v1", endpoint=prices | {"retries": 0})
    generate(settings, CONTRACT, prompt, ASK)
    assert cost.entries(settings) == []


def test_a_run_inside_a_running_loop(tmp_path, server):
    """A notebook has a loop of its own: asyncio.run would refuse."""
    import asyncio

    async def cell():
        return generate(project(tmp_path, server.url), CONTRACT, prompt, ASK)

    assert len(asyncio.run(cell()).rows) == 5


def dev_set(tmp_path):
    rows = [
        make_row(f"message {i} is {'ab'[i % 2]}", json.dumps({"label": "ab"[i % 2]}), category="ab"[i % 2]) for i in range(20)
    ]
    write_rows(tmp_path / "data/eval/dev.jsonl", rows)
    (tmp_path / "data/eval/test.jsonl").write_text("whoever reads this fails")


def shots(contract, rows):
    return [{"role": "system", "content": "Label it."}]


def test_a_teacher_that_can_do_the_task_is_feasible(tmp_path, server):
    """A good teacher refused for its code fence, a check that is paid twice, or one that looks at the test set."""
    settings = project(tmp_path, server.url, endpoint={"usd_per_1m_output": 1.0})
    dev_set(tmp_path)
    found = feasibility(settings, CONTRACT, shots)
    assert found.ok and "WARNING" not in found.sentence and found.table().loc[0, "teacher"] == "m"
    assert spending(settings)[["batch", "calls"]].values.tolist() == [["feasibility", 20]]
    feasibility(settings, CONTRACT, shots)
    assert len(server.prompts) == 20


def test_a_teacher_that_fails_the_contract_is_refused(tmp_path, server):
    """Hundreds of rows from a teacher that cannot do the task itself."""
    settings = project(tmp_path, server.url)
    dev_set(tmp_path)
    server.script = [lambda text: '{"label": "a"}'] * 20
    found = feasibility(settings, CONTRACT, shots)
    assert not found.ok and "cannot teach" in found.sentence and "0.9" in found.sentence
    assert feasibility(project(tmp_path, server.url, feasible_at=0.2), CONTRACT, shots).ok
    assert "WARNING" in feasibility(project(tmp_path, server.url, feasible_at=0.6), CONTRACT, shots).sentence


def test_feasibility_stops_at_the_budget(tmp_path, server):
    """A check that spends the money it should save."""
    settings = project(tmp_path, server.url, endpoint={"usd_per_1m_output": 1000.0}, budget_usd=0.5)
    dev_set(tmp_path)
    with pytest.raises(SlmError, match="budget"):
        feasibility(settings, CONTRACT, shots)
    assert 0 < cost.spent(settings) <= 0.5


def test_recorded_rows_are_not_run_but_looked_at(tmp_path):
    """A score invented for a teacher that cannot answer."""
    settings = project(tmp_path, teacher="recorded")
    rows = [make_row(f"r {i}", '{"label":"a"}' if i else "{}", category="a", source="teacher") for i in range(4)]
    write_rows(tmp_path / "data/raw/recorded_teacher.jsonl", rows)
    found = feasibility(settings, CONTRACT, shots)
    assert found.ok and "not run: recorded rows answer no new prompt; 0.750" in found.sentence
    assert estimate(settings, CONTRACT, prompt).loc["recorded", "calls"] == 0


@pytest.mark.slow
def test_a_local_gguf_writes_rows_of_the_contract(tmp_path):
    """A local teacher that needs a server, or whose every line is broken."""
    from slm.models.embedded import gguf_file

    settings = project(tmp_path, teacher="gguf", gguf=str(gguf_file()), context=512, tokens_per_row=60)
    result = generate(settings, CONTRACT, prompt, [Request("a", "canonical", "easy", 2)])
    assert result.rows and all(not CONTRACT.parse(r.answer).error for r in result.rows)
    assert result.rows[0].meta.provenance["teacher"] == gguf_file().name
    assert cost.entries(settings)[0]["tokens_out"] > 0 and cost.spent(settings) == 0
    with pytest.raises(SlmError, match="generate.gguf"):
        generate(project(tmp_path, teacher="gguf"), CONTRACT, prompt, ASK)


def schema_file(tmp_path):
    spec = {"properties": {"label": {"enum": ["a", "b"]}, "sure": {"type": "boolean"},
                           "order": {"anyOf": [{"type": "string"}, {"type": "null"}]}}}  # fmt: skip
    (tmp_path / "specs").mkdir(exist_ok=True)
    (tmp_path / "specs/output_schema.json").write_text(json.dumps(spec))


COLUMNS = "user=text,answer.label=intent,answer.sure=sure,answer.order=order,category=intent"


def test_import_keeps_licence_and_consent_of_each_row(tmp_path):
    """Guards against rows of customers whose consent is lost on the way in, so that nothing can refuse them."""
    settings = project(tmp_path)
    schema_file(tmp_path)
    file = tmp_path / "mine.csv"
    file.write_text("text,answer,terms,agreed\nhello there,{},CC-BY-4.0,Yes\ngood bye,{},,no\n", "utf-8")
    path, _ = import_rows(settings, str(file), "user=text,answer=answer,license=terms,consent=agreed", "production")
    facts = [{k: r.meta.provenance[k] for k in ("license", "consent")} for r in read_rows(path)]
    assert facts == [{"license": "cc-by-4.0", "consent": "yes"}, {"license": "", "consent": "no"}]
    assert [bool(restricted(r, ["consent=false"])) for r in read_rows(path)] == [False, True]


def test_import_of_csv_builds_answers_of_the_schema(tmp_path):
    """Cells that are all text: "TRUE" for true, "" for null, 0012 turned into a number."""
    settings = project(tmp_path)
    schema_file(tmp_path)
    file = tmp_path / "mine.csv"
    file.write_text('\ufefftext;intent;sure;order\n"two\nlines";a;TRUE;\nhello;b;false;0012\nhello;b;false;0012\n', "utf-8")
    path, count = import_rows(settings, str(file), COLUMNS, "production")
    rows = read_rows(path)
    assert count == 3 and path.name == "mine.jsonl" and rows[0].user == "two\nlines"
    assert [r.answer for r in rows[:2]] == [
        '{"label":"a","sure":true,"order":null}',
        '{"label":"b","sure":false,"order":"0012"}',
    ]
    assert rows[1].meta.provenance == {"batch": "mine", "imported": "mine.csv", "line": 4} and rows[1].meta.category == "b"
    assert {r.meta.source for r in rows} == {"production"}
    with pytest.raises(SlmError, match="exists already"):
        import_rows(settings, str(file), COLUMNS)


def test_import_names_the_physical_line_and_writes_nothing(tmp_path):
    """A line number that counts records, or a file half written."""
    settings = project(tmp_path)
    schema_file(tmp_path)
    file = tmp_path / "bad.csv"
    file.write_text('text,intent,sure,order\n"a\nb\nc",a,true,\nx,zzz,true,\ny,a\n,a,true,\n"open,a,true,\n')
    with pytest.raises(SlmError) as caught:
        import_rows(settings, str(file), COLUMNS)
    said = str(caught.value)
    assert all(f"bad.csv:{n}: " in said for n in (5, 6, 7, 8)) and "bad.csv:2" not in said and "'zzz'" in said
    assert not list((tmp_path / "data/generated").glob("*")) and not list((tmp_path / "data/generated").glob(".*"))
    file.write_bytes(b"text,intent\nok,a\n\xff\xfe,b\n")
    with pytest.raises(SlmError, match="bad.csv:3: not UTF-8"):
        import_rows(settings, str(file), "user=text,answer=intent")
    file.write_text("text,intent\nok,a\n")
    with pytest.raises(SlmError, match="bad.csv:2: no column 'label'; there are text, intent"):
        import_rows(settings, str(file), "user=text,answer=label")
    with pytest.raises(SlmError, match="--columns"):
        import_rows(settings, str(file), "usr=text")
    with pytest.raises(SlmError, match="no such file"):
        import_rows(settings, "absent.csv")


def test_import_of_the_four_formats(tmp_path):
    """A format that is documented and not read, or a bad line that is skipped."""
    settings, file = project(tmp_path), tmp_path / "four.jsonl"
    row = make_row("ready", "{}", category="b", kind="style")
    lines = [
        {"instruction": "Label it.", "input": "one", "output": "{}"},
        {"messages": [{"role": "user", "content": "two"}, {"role": "assistant", "content": "{}"}]},
        {"messages": [{"role": "user", "content": "go"}, {"role": "assistant", "content": '{"tool":"x","arguments":{}}'}]},
        {"prompt": "three", "chosen": "{}", "rejected": "[]"}, row.model_dump(exclude_none=True),
    ]  # fmt: skip
    write_jsonl(file, lines)
    rows = read_rows(import_rows(settings, str(file))[0])
    assert len(rows) == 5 and rows[3].rejected == "[]" and rows[4].meta.kind == "style" and rows[4].id == row.id
    file.write_text(json.dumps(lines[0]) + '\n\n{"messages": []}\n[1]\n{broken\n')
    with pytest.raises(SlmError, match=r"four.jsonl:3: (.|\n)*four.jsonl:4: a line(.|\n)*four.jsonl:5: not JSON"):
        import_rows(settings, str(file), out="data/generated/b.jsonl")


def test_import_of_parquet_and_datasets(tmp_path):
    """Class labels that arrive as numbers, or a bad row without its number."""
    datasets = pytest.importorskip("datasets")
    settings = project(tmp_path)
    features = datasets.Features({"text": datasets.Value("string"), "intent": datasets.ClassLabel(names=["a", "b"])})
    data = datasets.Dataset.from_dict({"text": ["one", "two"], "intent": [1, 0]}, features=features)
    data.save_to_disk(str(tmp_path / "folder"))
    how = "user=text,answer.label=intent,category=intent"
    rows = read_rows(import_rows(settings, str(tmp_path / "folder"), how)[0])
    assert [(r.answer, r.meta.category) for r in rows] == [('{"label":"b"}', "b"), ('{"label":"a"}', "a")]
    data = datasets.Dataset.from_dict({"text": ["one", None], "answer": [{"label": "a"}, {"label": "b"}]})
    data.to_parquet(str(tmp_path / "mine.parquet"))
    with pytest.raises(SlmError, match="mine.parquet: row 2: the user is empty"):
        import_rows(settings, str(tmp_path / "mine.parquet"), "user=text,answer=answer")
    data.select([0]).to_parquet(str(tmp_path / "mine.parquet"))
    assert (
        read_rows(import_rows(settings, str(tmp_path / "mine.parquet"), "user=text,answer=answer")[0])[0].answer
        == '{"label":"a"}'
    )
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(SlmError, match="torn.parquet"):
        import_rows(settings, str(tmp_path / "torn.parquet"))


def test_the_command_imports_and_refuses_with_one_line(tmp_path):
    """A traceback for a typo, or exit code 0 for an import that failed."""
    project(tmp_path)
    (tmp_path / "mine.csv").write_text('text,answer\nhello,"{""label"":""a""}"\n')
    command = [sys.executable, "-m", "slm", "import", "mine.csv", "--columns"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    bad = subprocess.run([*command, "user=nope,answer=answer"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert bad.returncode == 1 and "mine.csv:2: no column 'nope'" in bad.stderr and "Traceback" not in bad.stderr
    done = subprocess.run([*command, "user=text,answer=answer"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "1 rows in" in done.stdout, done.stderr
