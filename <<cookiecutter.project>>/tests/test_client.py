"""The client asks as trained, is held to the schema, and fails loudly; against a real server and against a lying one."""

# ruff: noqa: F401, F811

import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
from pydantic import BaseModel, ConfigDict
from servers import completion, double, real_server
from test_export import CONTRACT, project

from slm.modules import load_module


class Colour(BaseModel):
    model_config = ConfigDict(extra="forbid")
    colour: Literal["red", "blue"]
    sure: bool


SHORT = replace(CONTRACT, output=Colour)  # no free text: a random model under the grammar always ends


@pytest.fixture(scope="module")
def folder(project):
    """client/ of the tiny model, as 08 writes it beside the file."""
    from slm.export.client import write_client
    from slm.settings import load_settings

    settings, merged, files = project
    settings = load_settings(start=settings.root, run_id="t", overrides={"evaluate.max_new_tokens": 320})
    settings.path("client/requests.jsonl.1").write_text("a log that must not be handed out\n")
    written = write_client(settings, SHORT, merged, files[0].path)
    assert [f.name for f in written] == ["README.md", "client.py", "contract.json", "log.py", "request.json"]
    return written[0].parent


@pytest.fixture(scope="module")
def client(folder):
    """The shipped client.py as a module."""
    return load_module(folder / "client.py")


def recipe(folder, server: str) -> list[str]:
    """The command that the client's README gives for a server, with the tiny model's f16 file."""
    row = next(line for line in (folder / "README.md").read_text().splitlines() if line.startswith(f"| {server} |"))
    values = {"FILE": str(folder.parent / "model-f16.gguf"), "NAME": "tiny"}
    return [values.get(word, word) for word in shlex.split(row.split("`")[1])]


@pytest.fixture(scope="module", params=["llama-cpp-python", "llama.cpp"])
def url(folder, request):
    """A real server, started as the README says: llama-cpp-python's own, and llama.cpp's llama-server where there is one."""
    program = os.environ.get("LLAMA_SERVER") or shutil.which("llama-server")
    if request.param == "llama-cpp-python":
        command = [sys.executable, *recipe(folder, request.param)[1:], "--n_threads", "1"]
    elif program:
        command = [program, *recipe(folder, request.param)[1:], "--threads", "1"]
    else:
        pytest.skip("no llama-server on PATH or in LLAMA_SERVER")
    with real_server(*command) as (address, _):
        yield address


@pytest.fixture
def lying():
    """A function: start a server that answers so; returns its address and the requests that it got. 422: it does not
    know the newer form of constraint."""
    with ExitStack() as servers:

        def start(content: str, finish: str = "stop", status: int = 200):
            got = []

            def reply(body):
                got.append(body)
                if status == 422 and body["response_format"]["type"] == "json_schema":
                    return 422, {"detail": "response_format: not json_object"}, {}
                return 200 if status == 422 else status, completion(content, finish), {}

            return servers.enter_context(double(reply)) + "/v1", got

        yield start


def test_a_real_server_answers_in_the_contracts_terms(client, folder, url):
    """Guards against a client that works in its own tests alone: prompt, schema and answer through a real runtime."""
    contract = client.load() | {"url": url}
    assert client.check(contract) == contract["probe"]["prompt_tokens"] > 30
    value = client.ask(contract, "The sky at noon.")
    assert SHORT.parse(json.dumps(value)).error is None
    command = [sys.executable, str(folder / "client.py"), "--url", url]
    done = subprocess.run([*command, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "as trained" in done.stdout, done.stderr


def test_golden_rows_score_the_same_through_server_and_client_as_in_process(client, project, url, request):
    """Guards against a server that answers well-formed and otherwise than the file that was proven."""
    from slm.evaluate.scorers import answer_rows
    from slm.models.llama_cpp import LlamaCppModel
    from slm.models.program import ProgramModel
    from slm.rows import make_row
    from test_export import ROWS

    contract, server = client.load() | {"url": url}, request.node.callspec.params["url"]
    rows = [make_row(r.user, SHORT.dump({"colour": "blue", "sure": True}), id=r.id, category="x") for r in ROWS]
    served = ProgramModel("client", lambda text: json.dumps(client.ask(contract, text)))
    model = LlamaCppModel(project[2][0].path, repeat_penalty=1.05)
    here, there = (answer_rows(m, rows, SHORT, 320, schema=SHORT.schema) for m in (model, served))
    model.close()
    assert all(s.parsed for s in there)
    if server == "llama-cpp-python":  # llama-server's grammar lets an untrained model write blanks, and so other values
        assert [(s.parsed, s.value) for s in there] == [(s.parsed, s.value) for s in here]


def test_the_log_of_a_real_server_is_judged_sampled_and_booked(client, folder, url, project):
    """Guards against a monitor that only knows planted logs: client, logger and server as shipped, twelve requests with
    probabilities and one that nobody answers."""
    from slm import cost
    from slm.production import read_logs, sample, watch
    from slm.settings import load_settings

    logger = load_module(folder / "log.py")
    contract = client.load() | {"url": url}
    contract["sampling"] |= {"logprobs": True, "top_logprobs": 1}
    name = contract["version"] = f"asked-{url.split(':')[2].split('/')[0]}.jsonl"  # a log and a model for each server
    rates = {"production.logs": name, "production.low_confidence": 1, "production.random_share": 0, "cost.serving_hourly_rate": 1}
    settings = load_settings(start=project[0].root, overrides=rates)
    with logger.Log(settings.path(name), contract["version"]) as log:
        for n in range(12):
            client.ask(contract, f"The sky at {n} o'clock.", log, consent=n != 3)
        with pytest.raises(client.ClientError):
            client.ask(contract | {"url": "http://127.0.0.1:9/v1"}, "The sea.", log, consent=True)
    logs = read_logs(settings.path(name))
    answered = [one for one in logs.every if one.output]
    assert not logs.problems and len(answered) == 12 and len(logs.lines) == 12 and logs.no_consent == 1
    assert all(0 < one.confidence < 1 and one.tokens_in > 20 and one.tokens_out > 5 for one in answered)
    assert len(set(one.confidence for one in answered)) > 1
    errors, wait, price = watch(settings, SHORT)["lines"][:3]
    assert (errors["n"], errors["value"], errors["verdict"]) == (13, pytest.approx(1 / 13), "too few")
    assert wait["n"] == 12 and 0 < wait["value"] < 60 and price["value"] == pytest.approx(statistics.median(one.latency_s for one in answered) / 3.6)
    why = [record["why"] for record in sample(settings, SHORT, logs.lines).review]
    assert why.count("low confidence") == 11 and why.count("failure without a correction") == 1
    assert [line["requests"] for line in cost.serve(settings, logs.every)] == [12] and cost.serve(settings, logs.every) == []


def test_another_system_prompt_at_the_server_is_named(client, url):
    """Guards against garbage answers from a server that renders another prompt than training did."""
    with pytest.raises(client.ClientError, match="another chat template, system prompt"):
        client.check(client.load() | {"url": url, "system": "You are a helpful assistant."})


def test_curl_sends_the_same_request(client, folder, url):
    """Guards against a curl line that only looks right."""
    if not shutil.which("curl"):
        pytest.skip("no curl on this machine")
    command = [sys.executable, str(folder / "client.py"), "--body", "json_object", "The sea."]
    body = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    line = ["curl", "-s", f"{url}/chat/completions", "-H", "Content-Type: application/json", "-d", "@-"]
    reply = json.loads(subprocess.run(line, input=body, capture_output=True, text=True, check=True).stdout)
    assert SHORT.parse(reply["choices"][0]["message"]["content"]).error is None


def test_request_is_the_trained_prompt_and_parameters(client, folder, lying):
    """Guards against another prompt, sampling at random, an unbounded answer, or a schema that is not sent."""
    address, got = lying('{"colour": "red", "sure": true}')
    client.ask(client.load() | {"url": address}, "Blood.")
    sent = got[0]
    assert sent["messages"] == SHORT.prompt("Blood.") and sent["response_format"]["json_schema"]["schema"]["required"] == ["colour", "sure"]
    assert (sent["temperature"], sent["top_p"], sent["repeat_penalty"], sent["max_tokens"]) == (0, 1, 1.05, 320)
    assert sent["stop"] == ["<|im_end|>"]
    request = json.loads((folder / "request.json").read_text())
    assert request == client.body(client.load(), client.load()["probe"]["text"])


def test_text_is_composed_and_trimmed_where_training_did(client):
    """Guards against an accent or a line end that gives other tokens than in training (Qwen, Llama 3, Gemma)."""
    contract = client.load()
    assert client.body(contract, " e\u0301\n")["messages"][1]["content"] == " e\u0301\n"
    assert client.body(contract | {"nfc": True, "strip": True}, " e\u0301\n")["messages"][1]["content"] == "\u00e9"


@pytest.mark.parametrize("content, finish, status, problem", [
    ('{"colour": "green", "sure": true}', "stop", 200, r"breaks the contract at \$.colour: 'green'"),
    ('{"colour": "red"}', "stop", 200, "'sure' is a required property"),
    ('{"colour": "red", "sure": true, "x": 1}', "stop", 200, "Additional properties"),
    ('{"colour": "red", "sure": true}', "length", 200, "did not end by itself"),
    ("Red, I think.", "stop", 200, "not JSON"),
    ("", "stop", 500, "HTTP 500"),
])  # fmt: skip
def test_a_bad_answer_is_an_error(client, lying, content, finish, status, problem):
    """Guards against a wrong, cut or free answer that passes for a value."""
    address, _ = lying(content, finish, status)
    with pytest.raises(client.ClientError, match=problem):
        client.ask(client.load() | {"url": address}, "x")


def test_every_request_reaches_the_log(client, lying):
    """Guards against a log of successes: a broken answer is what the flywheel learns from."""
    lines, contract = [], client.load()
    log = type("Log", (), {"write": lambda self, *facts, **more: lines.append((*facts, more))})()
    good, bad = lying('{"colour": "red", "sure": true}')[0], lying("Red, I think.")[0]
    client.ask(contract | {"url": good}, "Blood.", log, consent=True)
    for url in (bad, "http://127.0.0.1:9/v1"):
        with pytest.raises(client.ClientError):
            client.ask(contract | {"url": url}, "Blood.", log, consent=False, group="c1")
    assert [(text, output, ok) for text, output, _, ok, _ in lines] == [
        ("Blood.", '{"colour": "red", "sure": true}', True), ("Blood.", "Red, I think.", False), ("Blood.", "", False),
    ]  # fmt: skip
    assert lines[0][2] > 0 and lines[2][4] == {"consent": False, "group": "c1", "model_version": "t f16"}


@pytest.mark.parametrize("reply, kept", [
    ({"usage": {"prompt_tokens": 40, "completion_tokens": 9}, "choices": [{"logprobs": {"content": [{"logprob": -0.1}, {"logprob": -0.7}]}}]},
     {"tokens_in": 40, "tokens_out": 9, "confidence": 0.4966}),
    ({"choices": [{"logprobs": {"content": [{"logprob": float("-inf")}]}}]}, {"confidence": 0.0}),
    ({"usage": {"prompt_tokens": "40"}, "choices": [{"logprobs": None}]}, {}), ({"choices": [{"logprobs": {"content": [{"logprob": None}]}}]}, {}),
    ({"choices": [{"logprobs": {"content": [{"logprob": float("nan")}]}}]}, {}), ({"choices": [{"logprobs": {"content": [{"logprob": 900}]}}]}, {}),
    ({"choices": []}, {}), (["?"], {}),
])  # fmt: skip
def test_what_the_server_says_of_tokens_and_probabilities_is_kept(client, reply, kept):
    """Guards against an odd reply that costs the answer its line, and figures in the log that no reader takes."""
    assert client.told(reply) == kept


def test_older_form_of_constraint_is_tried(client, lying):
    """Guards against a server that refuses json_schema and would then be asked without any constraint."""
    address, got = lying('{"colour": "red", "sure": false}', status=422)
    assert client.ask(client.load() | {"url": address}, "x") == {"colour": "red", "sure": False}
    assert [sent["response_format"]["type"] for sent in got] == ["json_schema", "json_object"]
    assert got[1]["response_format"]["schema"] == client.load()["schema"]


def test_no_server_and_no_contract_say_so(client, folder, tmp_path):
    """Guards against a traceback on a machine where nothing is started or nothing was exported yet."""
    with pytest.raises(client.ClientError, match="is the server running"):
        client.ask(client.load() | {"url": "http://127.0.0.1:9/v1"}, "x")
    alone = shutil.copy(folder / "client.py", tmp_path)
    done = subprocess.run([sys.executable, alone, "x"], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.strip().endswith("contract.json: not there; 08_export writes it.")


def test_client_needs_nothing_of_the_project():
    """Guards against a client that cannot leave the project."""
    text = Path("client/client.py").read_text()
    assert "slm" not in text and "task" not in text
