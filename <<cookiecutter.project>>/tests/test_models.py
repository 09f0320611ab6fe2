"""Models: batches, the answer cache, the endpoint client, the runtime."""

import json

import pytest
from servers import completion, double, last

from slm.errors import SlmError
from slm.models import Answer, Prompt, alone
from slm.models.cache import CachedModel
from slm.models.base import common_prefix
from slm.models.openai_api import OpenAIModel
from slm.models.program import ProgramModel
from slm.sections import Endpoint


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


def test_weights_are_those_of_bfloat16_whatever_they_are_computed_in(tiny, monkeypatch):
    """Guards against a model that is evaluated with other weights than 08 exports, and against mixed caches."""
    torch = pytest.importorskip("torch")
    from slm.models import hf

    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        monkeypatch.setattr(hf, "compute_dtype", lambda dtype=dtype: dtype)
        found[dtype] = hf.HFModel(hf.Path(tiny.model.name_or_path), "tiny")
        assert found[dtype].model.dtype == dtype
    half, full = (found[dtype].model.state_dict() for dtype in (torch.bfloat16, torch.float32))
    assert all(torch.equal(half[name].float(), full[name]) for name in half)
    assert found[torch.bfloat16].fingerprint != found[torch.float32].fingerprint


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


@pytest.fixture(scope="module")
def runtime():
    """The embedded file with three slots, and what makes models over it."""
    pytest.importorskip("llama_cpp")
    from slm.models.embedded import gguf_file
    from slm.models.llama_cpp import LlamaCppModel

    model = LlamaCppModel(gguf_file(), context=512, threads=1, slots=3)
    yield model
    model.close()


@pytest.fixture(scope="module")
def plain():
    """The runtime as its own package drives it, one prompt at a time."""
    llama_cpp = pytest.importorskip("llama_cpp")
    from slm.models.embedded import gguf_file

    llama = llama_cpp.Llama(str(gguf_file()), n_ctx=512, n_threads=1, n_threads_batch=1, verbose=False, seed=0, logits_all=True)

    def ask(asked: Prompt, penalty: float = 1.0, **options) -> dict:
        llama.reset()
        out = llama.create_chat_completion(
            asked.messages, max_tokens=asked.max_tokens, temperature=asked.temperature, top_p=1.0, seed=asked.seed,
            repeat_penalty=penalty, **options,
        )  # fmt: skip
        return out["choices"][0] | out["usage"]

    yield ask
    llama.close()


QUESTIONS = ("Name a colour.", "What is 2 + 2?", "Say hello.", "Where is Paris? Answer in one word.", "Name an animal.", "Count to three.")


def test_sequences_decoded_together_answer_as_one_by_one(runtime, plain):
    """Guards against a slot that reads another slot's memory, a prefix that is cut wrongly, and answers that are swapped."""
    prompts = [prompt(text, 3 + 3 * n) for n, text in enumerate(QUESTIONS)]
    together, alone_ = runtime.answer(prompts), [plain(p) for p in prompts]
    assert [a.text for a in together] == [a["message"]["content"] for a in alone_]
    assert [(a.prompt_tokens, a.completion_tokens, a.finish_reason) for a in together] == [
        (a["prompt_tokens"], a["completion_tokens"], a["finish_reason"]) for a in alone_
    ]
    assert len({a.text for a in together}) == len(prompts)


def test_a_guess_changes_no_answer_and_spares_decoding(runtime, monkeypatch):
    """Guards against a wrong guess that is taken for the answer or stays in memory, and against one that is never read."""
    from slm.models.sequences import Sequences

    steps, decode = [], Sequences._decode
    monkeypatch.setattr(Sequences, "_decode", lambda self, parts: steps.append(len(parts)) or decode(self, parts))

    def ask(guesses):
        runtime.guess([p.messages for p in prompts], guesses)
        steps.clear()
        return runtime.answer(prompts), len(steps)

    prompts = [prompt(text, 10 + n) for n, text in enumerate(QUESTIONS) if "Paris" not in text]  # there two tokens are near
    plain, usual = ask([""] * len(prompts))
    texts = [a.text for a in plain]
    halves = [f"{text[: len(text) // 2]} and something else, which goes on for longer than any answer may be" for text in texts]
    for guesses, most in ((texts, usual - 3), (halves, 2 * usual), (texts[::-1], 2 * usual), ([t + t for t in texts], usual - 3)):
        found, took = ask(guesses)
        assert [(a.text, a.finish_reason, a.completion_tokens) for a in found] == [
            (a.text, a.finish_reason, a.completion_tokens) for a in plain
        ]
        assert [log for a in found for _, log in a.pieces] == pytest.approx([log for a in plain for _, log in a.pieces], abs=0.2)
        assert took <= most, (took, usual)
    runtime.guess([prompts[-1].messages], texts[-1:])
    steps.clear()
    assert runtime.answer(prompts[-1:])[0].text == texts[-1]
    assert steps[1:] == [1] * (plain[-1].completion_tokens - (plain[-1].finish_reason == "length"))  # a lone one is timed
    runtime.guess([], [])


def test_memory_is_that_of_a_lone_request_whatever_came_before():
    """Guards against a table in which one file's memory is that of sixteen conversations and another's that of one."""
    pytest.importorskip("llama_cpp")
    from slm.models.embedded import gguf_file
    from slm.models.llama_cpp import LlamaCppModel

    found = []
    for before in ([], [], [prompt(text, 2) for text in QUESTIONS]):  # the first fills what the process keeps
        model = LlamaCppModel(gguf_file(), threads=1)
        if before:
            model.answer(before)
            assert model.memory_mb is None
        model.answer([prompt("Say hello.", 2)])
        found.append(model.memory_mb)
        model.close()
    assert 80 < found[1] and abs(found[1] - found[2]) < 20, found


def test_a_lone_prompt_after_another_starts_from_what_they_share(runtime):
    """Guards against tokens of the last lone answer that stay in the memory of the next."""
    first, second, again = (runtime.answer([prompt(text, 8)])[0] for text in ("Name a colour.", "What is 2 + 2?", "Name a colour."))
    assert first.text == again.text != second.text
    assert 0 < first.first_token_s < first.latency_s
    assert runtime.answer([prompt("Say hello."), prompt("Say bye.")])[0].first_token_s is None


def test_log_probabilities_are_the_models_own(runtime, plain):
    """Guards against probabilities after the repeat penalty, or of another row's logits."""
    asked = [prompt(text, 6) for text in QUESTIONS[:4]]
    for answer, own in zip(runtime.answer(asked), (plain(p, logprobs=True, top_logprobs=1) for p in asked), strict=True):
        logs = [token["logprob"] for token in own["logprobs"]["content"]][: len(answer.pieces)]
        assert "".join(text for text, _ in answer.pieces) == answer.text
        assert [log for _, log in answer.pieces] == pytest.approx(logs, abs=0.15) and all(log <= 0 for log in logs)


def test_the_repeat_penalty_is_the_runtimes_own(plain):
    """Guards against a file that is proven without the penalty that it ships with."""
    from slm.models.embedded import gguf_file
    from slm.models.llama_cpp import LlamaCppModel

    model, asked = LlamaCppModel(gguf_file(), context=512, threads=1, repeat_penalty=1.3), prompt("Say no, no, no, ten times.", 24)
    answer, free = model.answer([asked])[0], plain(asked)
    model.close()
    assert answer.text == plain(asked, 1.3)["message"]["content"] != free["message"]["content"]


def test_a_teachers_temperature_and_seed_are_kept(runtime, plain):
    """Guards against greedy rows from a teacher that was asked for variety."""
    asked = [Prompt(prompt("Invent a name.").messages, 8, temperature=1.0, seed=seed) for seed in (1, 2)]
    one, two = (runtime.answer([p])[0].text for p in asked)
    assert one != two and [one, two] == [plain(p)["message"]["content"] for p in asked]


def test_a_prompt_over_the_context_is_an_error_and_the_others_are_answered(runtime):
    """Guards against one endless mail that ends the evaluation."""
    long, short = runtime.answer([prompt("word " * 600), prompt("Say hello.")])
    assert long.finish_reason == "error" and "512" in long.text and short.text and short.finish_reason != "error"
    nearly = runtime.answer([prompt("word " * 480, 400)])[0]
    assert nearly.prompt_tokens + nearly.completion_tokens <= 512 and nearly.finish_reason in ("length", "stop")


def test_half_a_character_and_a_stop_text_are_cut_cleanly():
    """Guards against pieces that do not add up to the text, and against replacement characters in it."""
    from slm.models.sequences import Job

    smile = "\U0001f642".encode()
    job = Job([1], 9, stop=[b"<end>"], found=[(b"a", -0.1), (smile[:2], -0.2), (smile[2:], -0.3), (b"b<e", -0.4), (b"nd>c", -0.5)])
    assert job.pieces() == (("a", -0.1), ("", -0.2), ("\U0001f642", -0.3), ("b", -0.4))
    assert Job([1], 9, found=[(b"x", -1.0), (smile[:3], -2.0)]).pieces() == (("x", -1.0), ("", -2.0))


def test_the_runtime_keeps_to_the_schema(runtime, plain):
    """Guards against constrained decoding that is asked for and not in force, or in force for the neighbour too."""
    from llama_cpp.llama_grammar import LlamaGrammar
    from slm.models.llama_cpp import _inlined
    from task.contract import contract

    free = Prompt(contract.prompt("hello"), 60)
    bound = [Prompt(contract.prompt(text), 100, contract.schema) for text in ("hello", "My invoice 17 is wrong.")]
    one, *rest = runtime.answer([free, *bound])
    assert contract.parse(one.text).error and all(json.loads(a.text)[contract.label_field] for a in rest)
    grammar = LlamaGrammar.from_json_schema(json.dumps(_inlined(contract.schema)), verbose=False)
    assert rest[0].text == plain(bound[0], grammar=grammar)["message"]["content"]


def test_a_template_that_refuses_is_named(runtime):
    """Guards against a template's error for each row, taken for an answer."""
    with pytest.raises(SlmError, match="chat template refuses"):
        runtime.answer([Prompt([{"role": "user"}], 4), Prompt([{"content": object()}], 4)])


def test_transformers_keep_to_the_schema(tiny):
    """Guards against a constrained column in the table that was decoded freely; a random model knows no JSON by itself."""
    pytest.importorskip("llguidance")
    schema = {
        "type": "object", "properties": {"ok": {"type": "boolean"}, "kind": {"enum": ["a", "b"]}},
        "required": ["ok", "kind"], "additionalProperties": False,
    }  # fmt: skip
    bound, free = tiny.answer([Prompt(prompt("x").messages, 40, schema), prompt("x", 40)])
    assert json.loads(bound.text).keys() == {"ok", "kind"} and bound.finish_reason == "stop"
    with pytest.raises(json.JSONDecodeError):
        json.loads(free.text)
    with pytest.raises(SlmError, match="output schema"):
        tiny.answer([Prompt(prompt("x").messages, 8, {"type": "nothing"})])


def test_pieces_add_up_to_the_text_of_transformers(tiny):
    """Guards against probabilities that belong to other characters than they are read for."""
    for answer in tiny.answer([prompt(t, 20) for t in ("a", "b c d", "\u00e9 \U0001f642")]):
        assert "".join(text for text, _ in answer.pieces) == answer.text and len(answer.pieces) == answer.completion_tokens
        assert all(log <= 0 for _, log in answer.pieces) and answer.first_token_s is None
    assert tiny.memory_mb is not None and 0 < tiny.answer([prompt("a", 4)])[0].first_token_s


@pytest.mark.parametrize("family", ["llama", "mistral", "phi3", "qwen2", "qwen3", "gemma3_text"])
def test_attention_without_copies_is_the_familys_own(family, tiny):
    """Guards against a family whose heads, scaling or window the quick attention gets wrong, for lone and padded rows."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from slm.models.hf import HFModel

    config = AutoConfig.for_model(
        family, vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        sliding_window=8 if family == "gemma3_text" else None,
    )  # fmt: skip
    torch.manual_seed(0)
    reference = AutoModelForCausalLM.from_config(config).eval()
    model = HFModel.__new__(HFModel)
    model.tokenizer, model.model, model._batch, model.name, model.memory_mb = tiny.tokenizer, reference, 2, family, 0.0
    model._ends, model._guide = {2}, None
    ids = [[5, 6, 7, *range(20, 20 + n)] for n in (1, 9, 4, 30)]
    want = []
    for row in ids:
        out = reference.generate(torch.tensor([row]), attention_mask=torch.ones(1, len(row)), max_new_tokens=12, do_sample=False)
        want.append([token for token in out[0, len(row) :].tolist() if token != 2])
    model._fold()
    assert model._folds == (family != "gemma3_text")
    model.tokenizer = Ids(ids)
    assert [json.loads(a.text) for a in model.answer([prompt(str(n), 12) for n in range(4)])] == want
    assert [json.loads(model.answer([prompt(str(n), 12)])[0].text) for n in range(4)] == want


class Ids:
    """A tokenizer for which the user's text is the number of a prompt, and a text the list of its tokens."""

    def __init__(self, ids):
        self.ids = ids

    def apply_chat_template(self, messages, **_):
        """The number."""
        return messages[-1]["content"]

    def __call__(self, text, **_):
        """The prompt of that number."""
        return {"input_ids": self.ids[int(text)]}

    def decode(self, tokens, **_):
        """The tokens, as JSON."""
        return json.dumps(tokens)


@pytest.fixture
def server():
    """A local endpoint: the first request of each text is refused with 429, "broken" always with 401."""
    seen = []

    def reply(body):
        text = last(body)
        status = 401 if text == "broken" else 429 if text not in seen else 200
        seen.append(text)
        sent = completion(text.upper(), completion_tokens=2) if status == 200 else {"error": {"message": "no"}}
        return status, sent, {}

    with double(reply) as address:
        yield Endpoint(url=f"{address}/v1", model="m", concurrency=4)


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
