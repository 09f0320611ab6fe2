"""The Modelfile: the model's own chat template as Go template, the contract's system prompt, the parameters that were
evaluated; and the proof that it says what was trained. `Turn.render` does what Ollama does with the Go template."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from slm.errors import SlmError
from slm.export.merge import adds_bos, turn_end
from slm.train.encode import generation_ends, render

MARKERS = {
    "chatml": "<|im_start|>", "llama3": "<|start_header_id|>", "gemma": "<start_of_turn>", "phi": "<|end|>",
    "mistral": "[INST]",
}  # fmt: skip
SYSTEM, USER, USER2, ANSWER = "Zq7xSystemZq7x", "Zq7xUserZq7x", "Zq7xSecondZq7x", "Zq7xAnswerZq7x"
LINE = re.compile(r'(?ms)^(FROM|TEMPLATE|SYSTEM|PARAMETER \w+) (?:"""(.*?)"""|"([^"\n]*)"|([^\n"]*))$')


@dataclass(frozen=True)
class Turn:
    """A chat template in pieces: the first question is `head` SYSTEM `middle` USER, a later one, or one without system
    prompt, `plain` USER; an earlier answer is `past` ANSWER `end`; `reply` asks for the next one."""

    head: str
    middle: str
    plain: str
    reply: str
    past: str
    end: str
    last: bool = False  # the system prompt stands in the last question instead of the first (Mistral)
    trims: bool = False  # white space around a message is dropped, which no Go template can do

    def render(self, chat: list[dict]) -> str:
        """The prompt for a chat of an optional system prompt, then questions and answers by turns."""
        system = chat[0]["content"] if chat[0]["role"] == "system" else ""
        turns, text = [m for m in chat if m["role"] != "system"], ""
        for n, message in enumerate(turns):
            if message["role"] == "assistant":
                text += self.past + message["content"] + self.end
            elif system and n == (len(turns) - 1 if self.last else 0):
                text += self.head + system + self.middle + message["content"]
            else:
                text += self.plain + message["content"]
        return text + self.reply

    def fits(self, chat: list[dict]) -> bool:
        """Whether a Go template can render this chat as the tokenizer does."""
        return not self.trims or all(m["content"] == m["content"].strip() for m in chat)

    @property
    def go(self) -> str:
        """The Go template: for lone questions and turns where that is exact, else over Ollama's list of messages."""
        if self.past != self.reply or self.last:
            here = "(eq (len (slice $.Messages $n)) 1)" if self.last else "(eq $n 1)"
            first = f"{{{{ if and $.System {here} }}}}{self.head}{{{{ $.System }}}}{self.middle}"
            return (
                f'{{{{ range $n, $m := .Messages }}}}{{{{ if eq $m.Role "user" }}}}{first}{{{{ else }}}}{self.plain}'
                f'{{{{ end }}}}{{{{ $m.Content }}}}{{{{ else if eq $m.Role "assistant" }}}}{self.past}'
                f"{{{{ $m.Content }}}}{self.end}{{{{ end }}}}{{{{ end }}}}{self.reply}"
            )
        start = f"{{{{ if .System }}}}{self.head}{{{{ .System }}}}"
        if self.middle.endswith(self.plain):
            start += f"{self.middle.removesuffix(self.plain)}{{{{ end }}}}{self.plain}"
        else:
            start += f"{self.middle}{{{{ else }}}}{self.plain}{{{{ end }}}}"
        return f"{start}{{{{ .Prompt }}}}{self.reply}{{{{ .Response }}}}{self.end}"


def family(template: str) -> str:
    """The family of a chat template by its markers: chatml, llama3, gemma, phi, mistral or other."""
    return next((name for name, marker in MARKERS.items() if marker in template), "other")


def read_turn(tokenizer) -> Turn:
    """Take a chat template apart by rendering it around marked contents. Raises SlmError for a template that changes,
    moves or repeats the contents, since no Modelfile can say that."""

    def chat(*turns: str) -> list[dict]:
        roles = {SYSTEM: "system", ANSWER: "assistant"}
        return [{"role": roles.get(text.strip(), "user"), "content": text} for text in turns]

    def show(*turns: str, prompt: bool = True) -> str:
        try:
            return show_prompt(tokenizer, chat(*turns), prompt)
        except Exception as error:  # the template's own raise_exception, or any Jinja error
            roles = "+".join(m["role"] for m in chat(*turns))
            raise SlmError(f"the chat template refuses {roles} messages: {error}.") from None

    head, middle, reply = _cut(show(SYSTEM, USER), SYSTEM, USER)
    *_, close = _cut(show(USER, ANSWER, prompt=False), USER, ANSWER)
    _, past, between, _ = _cut(show(USER, ANSWER, USER2), USER, ANSWER, USER2)
    end = _shared(tokenizer, close, between)
    if not end:
        raise SlmError(f"the chat template ends the last turn with {close!r}, others {between!r}; it fits no Modelfile.")
    whole = show(SYSTEM, USER, ANSWER, USER2)
    last = whole.find(SYSTEM) > whole.find(ANSWER)
    padded = show(SYSTEM, f" {USER}\n")
    turn = Turn(head, middle, between.removeprefix(end), reply, past, end, last, trims=f" {USER}\n" not in padded)
    if turn.render(chat(SYSTEM, USER, ANSWER, USER2)) != whole:
        raise SlmError("the chat template renders a first and a later question by other rules; it fits no Modelfile.")
    pieces = head, middle, turn.plain, reply, past, end
    if any(mark in piece for piece in pieces for mark in ("{{", "}}", '"""')):
        raise SlmError('the chat template holds {{, }} or """ as text; it fits no Modelfile.')
    return turn


def show_prompt(tokenizer, chat: list[dict], prompt: bool = True) -> str:
    """A chat as the tokenizer renders it, less the BOS that a runtime adds by itself: written too, it were doubled."""
    text = render(tokenizer, chat, add_generation_prompt=prompt)
    return text.removeprefix(tokenizer.bos_token) if adds_bos(tokenizer) else text


def stop_texts(tokenizer, merged: Path) -> list[str]:
    """The texts of the tokens that end an answer: the chat's turn end, the tokenizer's EOS, the generation config's."""
    ends = (turn_end(tokenizer), tokenizer.eos_token_id, *generation_ends(merged))
    return [tokenizer.convert_ids_to_tokens(n) for n in dict.fromkeys(ends) if n is not None]


def render_modelfile(settings, contract, merged: Path, model: str, note: str = "") -> str:
    """The Modelfile's text. `model` is the GGUF's path as seen from the Modelfile, `note` goes into the first lines."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(merged)
    turn = read_turn(tokenizer)
    if '"""' in contract.system_prompt:
        raise SlmError('task/contract.py: system_prompt holds """, which a Modelfile cannot; write it otherwise.')
    note += "\nThis chat template drops white space around a message: send messages without it." if turn.trims else ""
    lines = [f"# {line}" for line in note.splitlines() if line]
    lines += [f"FROM {model}", f'TEMPLATE """{turn.go}"""', f'SYSTEM """{contract.system_prompt}"""']
    lines += [f"PARAMETER {name} {value}" for name, value in _parameters(settings).items()]
    lines += [f'PARAMETER stop "{text}"' for text in stop_texts(tokenizer, merged)]
    return "\n".join(lines) + "\n"


def check_modelfile(settings, contract, merged: Path, file: Path, chats: list[list[dict]]) -> int:
    """Read a Modelfile back and compare its model, template, system prompt, parameters and stops with what was trained;
    returns on how many chats its template was compared with the tokenizer's. Raises SlmError with every difference."""
    from transformers import AutoTokenizer

    tokenizer, found = AutoTokenizer.from_pretrained(merged), {}
    for name, *value in LINE.findall(Path(file).read_text(encoding="utf-8")):
        found.setdefault(name, []).append("".join(value))
    turn, template, problems = read_turn(tokenizer), "".join(found.get("TEMPLATE", [])), []
    if adds_bos(tokenizer) and tokenizer.bos_token in template:
        problems.append(f"TEMPLATE writes {tokenizer.bos_token}, which the runtime adds too: the BOS is doubled")
    elif template != turn.go:
        at = len(os.path.commonprefix([template, turn.go]))
        problems.append(f"TEMPLATE is not the model's chat template (from {template[at : at + 40]!r} on)")
    if found.get("SYSTEM") != [contract.system_prompt]:
        problems.append("SYSTEM is not the contract's system prompt")
    if not (Path(file).parent / "".join(found.get("FROM", ["none"]))).is_file():
        problems.append(f"FROM names no file here ({''.join(found.get('FROM', []))})")
    for name, value in _parameters(settings).items():
        if (got := found.get(f"PARAMETER {name}", ["not set"])) != [value]:
            problems.append(f"{name} is {', '.join(got)}, evaluated was {value}")
    if missing := [text for text in stop_texts(tokenizer, merged) if text not in found.get("PARAMETER stop", [])]:
        problems.append(f"no stop at {', '.join(missing)}, which ends an answer")
    fitting = [chat for chat in chats if turn.fits(chat)]
    if wrong := [n for n, chat in enumerate(fitting, 1) if turn.render(chat) != show_prompt(tokenizer, chat)]:
        problems.append(f"TEMPLATE renders {len(wrong)} of {len(fitting)} prompts otherwise (first: {wrong[0]})")
    if problems:
        raise SlmError(f"{file}: not the model that was trained: {'; '.join(problems)}. Run 08_export again.")
    return len(fitting)


def _parameters(settings) -> dict[str, str]:
    export, names = settings.export, ("temperature", "top_p", "repeat_penalty")
    return {name: f"{getattr(export, name):g}" for name in names} | {"num_ctx": str(export.context)}


def _shared(tokenizer, one: str, other: str) -> str:
    """The whole special tokens, and text between them, with which both texts begin."""
    if other.startswith(one):
        return one
    marks = "|".join(re.escape(token.content) for token in tokenizer.added_tokens_decoder.values())
    return "".join(os.path.commonprefix([re.split(f"({marks})", text) for text in (one, other)]))


def _cut(text: str, *marks: str) -> list[str]:
    pieces = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found or mark in text:
            raise SlmError("the chat template changes, moves or repeats a message; it fits no Modelfile.")
        pieces.append(before)
    return [*pieces, text]
