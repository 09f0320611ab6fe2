"""Models: batches, the answer cache, the endpoint client, the runtime."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from slm.errors import SlmError
from slm.models import Answer, Prompt, alone
from slm.models.cache import CachedModel
from slm.models.base import common_prefix
from slm.models.openai_api import OpenAIModel
from slm.models.program import ProgramModel
from slm.settings import Endpoint


def prompt(text: str, tokens: int = 8) -> Prompt:
    """A chat of a system and a user message."""
    return Prompt([{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}], tokens)


class Counting:
    """Answers in upper case and remembers what it was asked."""

    name, fingerprint = "counting", "counting-1"

    def __init__(self):
        self.asked = []

    def answer(self, prompts):
        """Upper-case the user's text; "fail" is an error, "die" ends the process."""
        texts = [p.messages[-1]["content"] for p in prompts]
        if "die" in texts:
            raise KeyboardInterrupt
        self.asked += texts
        return [Answer(t.upper(), 0.1, finish_reason="error" if t == "fail" else "stop") for t in texts]


def test_a_second_run_asks_nothing_and_a_killed_one_only_the_rest(tmp_path):
    """Guards against paying twice for one answer."""
    model = Counting()
    cached = CachedModel(model, tmp_path / "answers.sqlite", chunk=2)
    with pytest.raises(KeyboardInterrupt):
        cached.answer([prompt(t) for t in ("four", "five", "die")])
    assert [a.text for a in cached.answer([prompt(t) for t in ("five", "one", "four", "one")])] == ["FIVE", "ONE", "FOUR", "ONE"]
    assert sorted(model.asked) == ["five", "four", "one"]


def test_an_error_is_not_remembered(tmp_path):
    """Guards against a passing fault that is served from the cache for ever."""
    model = Counting()
    cached = CachedModel(model, tmp_path / "answers.sqlite")
    for _ in range(2):
        assert cached.answer([prompt("fail")])[0].finish_reason == "error"
    assert model.asked == ["fail", "fail"]


def test_another_fingerprint_is_another_answer(tmp_path):
    """Guards against yesterday's adapter answering for today's."""
    model = Counting()
    CachedModel(model, tmp_path / "answers.sqlite").answer([prompt("x")])
    model.fingerprint = "counting-2"
    CachedModel(model, tmp_path / "answers.sqlite").answer([prompt("x")])
    assert model.asked == ["x", "x"]


def test_a_program_answers_the_last_user_message():
    """Guards against a baseline that is shown the few-shot examples instead of the question."""
    model = ProgramModel("upper", str.upper)
    assert model.answer([prompt("hi")])[0].text == "HI" and [a.text for a in alone(model, [prompt("a"), prompt("b")])] == ["A", "B"]


@pytest.mark.parametrize(
    ("ids", "shared"), [([[1, 2, 3], [1, 2, 4]], 2), ([[1, 2], [1, 2]], 1), ([[1, 2], [1, 2, 3]], 1), ([[1]], 0), ([[5, 1], [6, 1]], 0)]
)
def test_the_shared_prefix_leaves_every_prompt_a_token(ids, shared):
    """Guards against a prompt that is wholly in the cache, so that nothing is left to generate from."""
    assert common_prefix(ids) == shared


@pytest.fixture(scope="module")
def tiny():
    """The tiny random model in 32-bit, where batching cannot change an answer by rounding."""
    pytest.importorskip("torch")
    from slm.models.embedded import tiny_folder
    from slm.models.hf import HFModel

    model = HFModel(tiny_folder(), "tiny", batch_size=3)
    model.model.float()
    return model


def test_batched_answers_equal_lone_ones(tiny):
    """Guards against padding or the shared prefix leaking into an answer."""
    prompts = [prompt(t, 12) for t in ("a", "a much longer question than the first one, with words", "b c", "d " * 40, "e")]
    lone = [tiny.answer([p])[0] for p in prompts]
    together = tiny.answer(prompts)
    assert [a.text for a in together] == [a.text for a in lone]
    assert [a.prompt_tokens for a in together] == [a.prompt_tokens for a in lone]
    assert len({a.text for a in lone}) > 1


def test_the_grammar_schema_keeps_a_field_called_title():
    """Guards against annotations and fields of one name being dropped together."""
    from slm.models.llama_cpp import _inlined

    schema = {"title": "X", "properties": {"title": {"type": "string", "title": "T", "pattern": r"^\d$"}}}
    assert _inlined(schema) == {"properties": {"title": {"type": "string", "pattern": "^[0-9]$"}}}


def test_a_missing_gguf_is_named(tmp_path):
    """Guards against a crash inside the runtime."""
    pytest.importorskip("llama_cpp")
    from slm.models.llama_cpp import LlamaCppModel

    with pytest.raises(SlmError, match="no such GGUF"):
        LlamaCppModel(tmp_path / "absent.gguf")
    (tmp_path / "torn.gguf").write_bytes(b"GGUF" + b"\0" * 64)
    with pytest.raises(SlmError, match="cannot load"):
        LlamaCppModel(tmp_path / "torn.gguf")


def test_the_runtime_keeps_to_the_schema():
    """Guards against constrained decoding that is asked for and not in force."""
    pytest.importorskip("llama_cpp")
    from slm.models.embedded import gguf_file
    from slm.models.llama_cpp import LlamaCppModel
    from task.contract import contract

    model = LlamaCppModel(gguf_file(), context=512)
    free, bound = model.answer([Prompt(contract.prompt("hello"), 60), Prompt(contract.prompt("hello"), 100, contract.schema)])
    model.close()
    assert contract.parse(free.text).error and json.loads(bound.text)[contract.label_field]


@pytest.fixture
def server():
    """A local endpoint: the first request of each text is refused with 429, "broken" always with 401."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = body["messages"][-1]["content"]
            status = 401 if text == "broken" else 429 if text not in seen else 200
            seen.append(text)
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text.upper()}}
            usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
            reply = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}
            data = json.dumps(reply if status == 200 else {"error": {"message": "no"}}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield Endpoint(url=f"http://127.0.0.1:{http.server_port}/v1", model="m", concurrency=4)
    http.shutdown()


def test_an_endpoint_is_asked_again_after_429_and_answers_in_order(server):
    """Guards against answers that are swapped by concurrency, or lost to a rate limit."""
    answers = OpenAIModel(server).answer([prompt(t) for t in ("a", "b", "c")])
    assert [a.text for a in answers] == ["A", "B", "C"] and answers[0].completion_tokens == 2


def test_a_refusal_of_the_endpoint_names_the_key_and_not_its_value(server, monkeypatch):
    """Guards against a secret in an error message."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    with pytest.raises(SlmError, match="401.*OPENAI_API_KEY") as caught:
        OpenAIModel(server).answer([prompt("broken")])
    assert "sk-very-secret" not in str(caught.value)
