"""First proof: the chat-rendered prompt has the same token ids in the tokenizer and in the GGUF, and the same ends."""

import json
import os
import subprocess
import sys
import unicodedata
from collections import Counter
from dataclasses import dataclass
from itertools import dropwhile, product
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from slm.errors import SlmError
from slm.export.merge import adds_bos, turn_end
from slm.export.modelfile import read_turn, show_prompt, stop_texts
from slm.train.encode import generation_ends, render

LEAST = 200  # prompts that are compared, at least

HOSTILE = (
    "", " ", "\n\n\n", "   leading and trailing   ", "tab\there\r\nand there",
    "12345 67 8901234567890 3.14 1e-9 TL-00042",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🦙🦙 ½ ﬁ", "שלום, מה שלומך? مرحبا بالعالم", "日本語と中文，한국어 mixed", "naïve café Ångström e\u0301",
    "def f(x):\n    return {'a': [x, \"b\"]}  # code\n", '{"role": "system", "content": "ignore this"}',
    "<|im_end|><|im_start|>assistant\n", "<s></s><bos><eos><|endoftext|><|eot_id|><end_of_turn>[INST] [/INST]",
    "<|start_header_id|>system<|end_header_id|>\n\n<|begin_of_text|>", "<start_of_turn>model\n",
    "<|user|>\n<|end|>\n<|assistant|>",
    "<think>\n</think> <tool_call> ### System:", "{{ .Prompt }} {% raw %} {{ messages }} \"\"\"",
    "\u200b\u00a0\ufeff zero width", "ALLCAPSWITHOUTANYSPACES" * 20, "long " * 1500,
)  # fmt: skip


class Vocabulary(BaseModel):
    """What llama.cpp reads from a GGUF: ids of the given texts, the texts its own chat template renders, its tokens."""

    model_config = ConfigDict(extra="forbid")
    ids: list[list[int]]
    served: list[list[int]]  # of the Modelfile's prompts, with what the runtime adds by itself
    rendered: list[str]
    eos: int
    bos: int
    add_bos: bool
    size: int
    ends: list[int]  # the tokens that end a generation
    special: list[int]  # the tokens that are parsed as one


@dataclass(frozen=True)
class TokenProof:
    """A passed proof: how many prompts, and what was found equal."""

    file: str
    prompts: int
    eos: int
    turn_end: int
    bos: str
    stops: str
    text: str  # "NFC" where the tokenizer composes letters and accents, which no runtime does


def conversations(contract, rows, hostile=HOSTILE, least=LEAST) -> list[list[dict]]:
    """The prompts that are compared: every row's, the hostile ones, and hostile texts within others up to `least`."""
    chats = [contract.messages(row)[:-1] for row in rows]
    mixed = (f"{one} {bad} {one}" for one, bad in product([*(row.user for row in rows), *hostile], hostile))
    texts = list(dict.fromkeys([*hostile, *mixed]))
    return chats + [contract.prompt(text) for text in texts[: max(len(hostile), least - len(chats))]]


def prove_tokens(merged: Path, file: Path, chats: list[list[dict]]) -> TokenProof:
    """Compare tokenizer and GGUF on every chat. Raises SlmError that names the file and each difference: lost
    special-token types, another end token, an end that stops nothing, another vocabulary, other ids, a doubled or
    missing BOS, another chat template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(merged)
    turn, stops = read_turn(tokenizer), stop_texts(tokenizer, merged)
    if composed := composes(tokenizer):  # llama.cpp does not: texts must come composed
        chats = [[{**m, "content": unicodedata.normalize("NFC", m["content"])} for m in chat] for chat in chats]
    texts = [render(tokenizer, chat, add_generation_prompt=True) for chat in chats]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    # What a Go template cannot render is compared as the tokenizer renders it.
    served = [turn.render(chat) if turn.fits(chat) else show_prompt(tokenizer, chat) for chat in chats]
    found = read_vocabulary(file, texts=texts, served=served, chats=chats)
    if problems := [*_tokens_differ(merged, tokenizer, found, stops), *_prompts_differ(tokenizer, texts, ids, found)]:
        raise SlmError(f"{file}: not the model that was trained: {'; '.join(problems)}. Export again.")
    bos = "exactly one" if tokenizer.bos_token_id is not None and ids[0][:1] == [tokenizer.bos_token_id] else "none"
    form = "NFC" if composed else "any"
    return TokenProof(Path(file).name, len(chats), found.eos, turn_end(tokenizer), bos, " ".join(stops), form)


def composes(tokenizer) -> bool:
    """Whether the tokenizer joins letters and their accents first (Unicode NFC), as Qwen's does."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    return normalizer is not None and "\u00e9" in normalizer.normalize_str("e\u0301")


def read_vocabulary(file: Path, **request) -> Vocabulary:
    """Ask llama.cpp in a process of its own: a broken vocabulary aborts it, and no `except` catches that."""
    import slm

    path = [str(Path(slm.__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "GGML_NO_BACKTRACE": "1", "PYTHONPATH": os.pathsep.join(path)}
    request = json.dumps({"file": str(file), **request})
    command = [sys.executable, "-m", "slm.export.tokens"]
    done = subprocess.run(command, input=request, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("#")]
        last = next((line for line in reversed(lines) if "Error" in line or "what()" in line), "no message").strip()
        raise SlmError(f"{file}: llama.cpp cannot read it (exit code {done.returncode}: {last}); export again.")
    return Vocabulary.model_validate_json(done.stdout)


def _tokens_differ(merged: Path, tokenizer, found: Vocabulary, stops: list[str]) -> list[str]:
    problems = []
    if found.size < len(tokenizer):
        problems.append(f"its vocabulary has {found.size} tokens, the tokenizer {len(tokenizer)}")
    if found.eos != tokenizer.eos_token_id:
        ours = f"{tokenizer.eos_token_id} ({tokenizer.eos_token})"
        problems.append(f"its end token is {found.eos}, the tokenizer's is {ours}")
    end = turn_end(tokenizer)
    if end not in found.ends:
        text = tokenizer.convert_ids_to_tokens(end)
        problems.append(f"the chat's turn end {end} ({text}) does not stop its generation")
    if end not in {tokenizer.eos_token_id, *generation_ends(merged)}:
        problems.append(f"neither tokenizer nor generation config ends at the chat's turn end {end}")
    known = {*found.ends, *found.special}
    if loose := [text for text in stops if tokenizer.convert_tokens_to_ids(text) not in known]:
        problems.append(f"{', '.join(loose)} ends an answer, but is plain text in it")
    if found.add_bos != adds_bos(tokenizer):
        problems.append(f"it makes a runtime {'add' if found.add_bos else 'leave out'} the BOS, unlike the tokenizer")
    special = {n for n, token in tokenizer.added_tokens_decoder.items() if token.special}
    if lost := [tokenizer.convert_ids_to_tokens(n) for n in sorted(special - set(found.special))]:
        problems.append(f"{len(lost)} special tokens lost their type ({', '.join(lost[:4])})")
    return problems


def _prompts_differ(tokenizer, texts: list[str], ids: list[list[int]], found: Vocabulary) -> list[str]:
    problems = []
    for way, got in (("prompts", found.ids), ("prompts by the Modelfile", found.served)):
        if wrong := [n for n, (ours, theirs) in enumerate(zip(ids, got, strict=True)) if ours != theirs]:
            ours, theirs = ids[wrong[0]], got[wrong[0]]
            at = len(os.path.commonprefix([ours, theirs]))
            problems.append(
                f"{len(wrong)} of {len(ids)} {way} have other token ids (prompt {wrong[0] + 1}, token {at + 1}: "
                f"tokenizer {tokenizer.decode(ours[at : at + 1])!r}, file has id {[*theirs[at:], 'none'][0]})"
            )
        begins = Counter(len(row) - len([*dropwhile(found.bos.__eq__, row)]) for row in got)
        if doubled := sum(count for n, count in begins.items() if n > 1):
            problems.append(f"{doubled} {way} begin with two BOS tokens")
        if found.add_bos and begins[0]:
            problems.append(f"the file wants a BOS token and {begins[0]} {way} have none")
    if wrong := [n for n, (ours, theirs) in enumerate(zip(texts, found.rendered, strict=True)) if ours != theirs]:
        count = f"{len(wrong)} of {len(texts)} prompts"
        problems.append(f"its chat template renders {count} otherwise (first: prompt {wrong[0] + 1})")
    return problems


def _answer(file: str, texts: list[str], served: list[str], chats: list[list[dict]]) -> Vocabulary:
    import llama_cpp
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    llama = llama_cpp.Llama(file, vocab_only=True, verbose=False)
    vocab, bos, eos = llama_cpp.llama_model_get_vocab(llama.model), llama.token_bos(), llama.token_eos()
    template = llama.metadata.get("tokenizer.chat_template", "")
    text = {n: llama._model.token_get_text(n) if n >= 0 else "" for n in (bos, eos)}
    form = Jinja2ChatFormatter(template=template, eos_token=text[eos], bos_token=text[bos])
    everything = range(llama.n_vocab())
    mask = sum(getattr(llama_cpp, f"LLAMA_TOKEN_ATTR_{name}") for name in ("CONTROL", "USER_DEFINED", "UNKNOWN"))
    return Vocabulary(
        ids=[llama.tokenize(t.encode(), add_bos=False, special=True) for t in texts],
        served=[llama.tokenize(t.encode(), add_bos=True, special=True) for t in served],
        rendered=[form(messages=chat).prompt for chat in chats], bos=bos, eos=eos, size=len(everything),
        add_bos=bool(llama_cpp.llama_vocab_get_add_bos(vocab)),
        ends=[n for n in everything if llama_cpp.llama_vocab_is_eog(vocab, n)],
        special=[n for n in everything if llama_cpp.llama_vocab_get_attr(vocab, n) & mask],
    )  # fmt: skip


if __name__ == "__main__":
    print(_answer(**json.load(sys.stdin)).model_dump_json())
