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
from slm.errors import SlmError
from slm.generate import Request, generate, grid, label_values, plan, teacher
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

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.prompts, self.lock, self.count = [], [], threading.Lock(), 0
        self.delay = 0.0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
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
            time.sleep(1.5)
            return None
        _, n, category, *_ = text.split()
        line = '{{"input": "message {0} of call {1} says hello", "output": {{"label": "{2}"}}, "group": "g{1}-{0}"}}'
        content = "\n".join(line.format(i, serial, category) for i in range(int(n)))
        if callable(step):
            content = step(content)
        usage = {"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150}
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
        self.reply(200, {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage})

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
    endpoint = {"url": url, "model": "m", "timeout_s": 0.5, "retries": 2, "concurrency": 3}
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
    settings = project(tmp_path, server.url, endpoint={"usd_per_1m_output": 1.0})
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
    assert "3 calls in a row" in result.stopped and result.calls == 3


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
    end = time.time() + 60
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
