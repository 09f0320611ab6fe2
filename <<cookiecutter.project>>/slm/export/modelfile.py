"""The Modelfile: what the chat template renders, as Go template; the contract's system prompt; the parameters that were evaluated."""

from dataclasses import dataclass

from slm.errors import SlmError
from slm.export.merge import turn_end
from slm.train.encode import render

MARKERS = {
    "chatml": "<|im_start|>", "llama3": "<|start_header_id|>", "gemma": "<start_of_turn>", "phi": "<|end|>", "mistral": "[INST]"
}  # fmt: skip
SYSTEM, USER, USER2, ANSWER = "Zq7xSystemZq7x", "Zq7xUserZq7x", "Zq7xSecondZq7x", "Zq7xAnswerZq7x"


@dataclass(frozen=True)
class Turn:
    """One turn of a chat template in pieces. With a system prompt: `head` SYSTEM `middle` USER `reply` ANSWER `end`;
    without: `plain` USER `reply` ANSWER `end`."""

    head: str
    middle: str
    plain: str
    reply: str
    end: str

    def render(self, system: str, user: str) -> str:
        """The prompt for one question, as the Go template gives it."""
        return (self.head + system + self.middle if system else self.plain) + user + self.reply

    @property
    def go(self) -> str:
        """The Go template (Ollama's variables)."""
        if self.middle.endswith(self.plain):
            start = f"{{{{ if .System }}}}{self.head}{{{{ .System }}}}{self.middle.removesuffix(self.plain)}{{{{ end }}}}{self.plain}"
        else:
            start = f"{{{{ if .System }}}}{self.head}{{{{ .System }}}}{self.middle}{{{{ else }}}}{self.plain}{{{{ end }}}}"
        return f"{start}{{{{ .Prompt }}}}{self.reply}{{{{ .Response }}}}{self.end}"


def family(template: str) -> str:
    """The family of a chat template by its markers: chatml, llama3, gemma, phi, mistral or other."""
    return next((name for name, marker in MARKERS.items() if marker in template), "other")


def read_turn(tokenizer) -> Turn:
    """Take a chat template apart by rendering it around marked contents. Raises SlmError for a template that changes,
    moves or repeats the contents, since no Modelfile can say that."""

    def show(*turns: tuple[str, str], prompt: bool = True) -> str:
        try:
            return _render(tokenizer, [{"role": role, "content": content} for role, content in turns], prompt)
        except Exception as error:  # the template's own raise_exception, or any Jinja error
            raise SlmError(f"the chat template refuses {'+'.join(t[0] for t in turns)} messages: {error}.") from None

    head, middle, reply = _cut(show(("system", SYSTEM), ("user", USER)), SYSTEM, USER)
    *_, end = _cut(show(("user", USER), ("assistant", ANSWER), prompt=False), USER, ANSWER)
    *_, between, _ = _cut(show(("user", USER), ("assistant", ANSWER), ("user", USER2)), USER, ANSWER, USER2)
    if not between.startswith(end):
        raise SlmError(f"the chat template ends a turn with {end!r} once and {between!r} before the next; it fits no Modelfile.")
    turn = Turn(head, middle, between.removeprefix(end), reply, end)
    if any(mark in piece for piece in (head, middle, turn.plain, reply, end) for mark in ("{{", "}}", '"""')):
        raise SlmError('the chat template holds {{, }} or """ as text; it fits no Modelfile.')
    return turn


def check_template(tokenizer, chats: list[list[dict]]) -> int:
    """Compare the Modelfile's template with the tokenizer's on the chats of one question; returns how many. Raises
    SlmError with the first chat that differs."""
    turn = read_turn(tokenizer)
    lone = [chat for chat in chats if [m["role"] for m in chat] == ["system", "user"]]
    for number, chat in enumerate(lone, 1):
        got = turn.render(chat[0]["content"], chat[-1]["content"])
        if got != _render(tokenizer, chat, True):
            raise SlmError(f"Modelfile: its template renders prompt {number} otherwise than the tokenizer does: {got[-120:]!r}.")
    return len(lone)


def render_modelfile(settings, contract, tokenizer, model: str, note: str = "") -> str:
    """The Modelfile's text. `model` is the GGUF's path as seen from the Modelfile, `note` goes into the first line."""
    turn, marker, export = read_turn(tokenizer), turn_end(tokenizer), settings.export
    if '"""' in contract.system_prompt:
        raise SlmError('task/contract.py: system_prompt holds """, which a Modelfile cannot; write it otherwise.')
    lines = [f"# {line}" for line in note.splitlines() if line]
    lines += [f"FROM {model}", f'TEMPLATE """{turn.go}"""', f'SYSTEM """{contract.system_prompt}"""']
    lines += [f"PARAMETER temperature {export.temperature:g}", f"PARAMETER top_p {export.top_p:g}"]
    lines += [f"PARAMETER repeat_penalty {export.repeat_penalty:g}", f"PARAMETER num_ctx {export.context}"]
    ends = (turn.end.strip() if marker is None else tokenizer.convert_ids_to_tokens(marker), tokenizer.eos_token)
    lines += [f'PARAMETER stop "{text}"' for text in dict.fromkeys(ends) if text]
    return "\n".join(lines) + "\n"


def _render(tokenizer, chat: list[dict], prompt: bool) -> str:
    text, bos = render(tokenizer, chat, add_generation_prompt=prompt), tokenizer.bos_token_id
    # The runtime adds BOS itself where the model has one; a template that writes it too would double it.
    doubled = bos is not None and tokenizer("x")["input_ids"][:1] == [bos]
    return text.removeprefix(tokenizer.bos_token) if doubled else text


def _cut(text: str, *marks: str) -> list[str]:
    pieces = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found or mark in text:
            raise SlmError("the chat template changes, moves or repeats a message; it fits no Modelfile.")
        pieces.append(before)
    return [*pieces, text]
