"""A GGUF file in llama.cpp, in process. Three ways in: messages, rendered text, token ids (to attribute a drop)."""

import json
from pathlib import Path

from tqdm.auto import tqdm

from slm.errors import SlmError
from slm.models.base import Answer, Prompt, common_prefix, resident_mb
from slm.models.sequences import CELLS, Job, Sequences


class LlamaCppModel:
    """A GGUF file; `slots` prompts are decoded together, a lone one starts from what it shares with the one before.
    `others` are the answers that `other_penalty` in place of `repeat_penalty` leaves as they are."""

    def __init__(
        self, file: Path, context: int = 2048, threads: int | None = None, repeat_penalty: float = 1.0, slots: int = 16,
        other_penalty: float | None = None,
    ):  # fmt: skip
        from slm.registry import file_hash

        file = Path(file)
        if not file.is_file():
            raise SlmError(f"{file}: there is no such GGUF file.")
        import llama_cpp

        before = resident_mb()
        try:  # its own context stays unused: Sequences makes one for as many sequences as are needed
            self.llama = llama_cpp.Llama(
                str(file), n_ctx=CELLS, n_threads=threads, n_threads_batch=threads, verbose=False, seed=0
            )
        except ValueError as error:
            raise SlmError(f"{file}: llama.cpp cannot load it ({error}); make it again with 08_export.") from None
        self.name, self.file, self._grammars = file.stem, file, {}
        # Megabytes that a lone request takes, known after the first one; those held now; answers guessed by prompt ids.
        self.memory_mb, self._mb, self._guesses = None, resident_mb() - before, {}
        self._context, self._penalty, self._other, self._same = context, repeat_penalty, other_penalty, {}
        self._sequences = Sequences(self.llama, slots, repeat_penalty)
        mark = f"llama.cpp2 {llama_cpp.__version__} {file_hash(file)[:16]} ctx{context} rp"
        self.fingerprint, self.other_fingerprint = f"{mark}{repeat_penalty}", f"{mark}{other_penalty}"

    def answer(self, prompts: list[Prompt]) -> list[Answer]:
        """Messages through the file's own chat template; constrained to `schema` where a prompt has one."""
        return self._run([(*self._render(prompt.messages), prompt) for prompt in prompts])

    def answer_ids(self, prompts: list[list[int]], max_tokens: int) -> list[Answer]:
        """Complete rendered prompts, given as token ids."""
        return self._run([(ids, [], Prompt([], max_tokens)) for ids in prompts])

    def guess(self, chats: list[list[dict]], texts: list[str]) -> None:
        """Likely answers to these messages, another model's: where they are right, many prompts are answered sooner."""
        self._guesses = {tuple(self.tokenize(chat)): self.tokenize(text) for chat, text in zip(chats, texts, strict=True)}

    def others(self, prompts: list[Prompt]) -> list[tuple[Prompt, Answer]]:
        """Those of the prompts, asked before, to which `other_penalty` gives the very same answer, and that answer."""
        rendered = [(prompt, *self._render(prompt.messages)) for prompt in prompts]
        found = [(prompt, self._same.get((*ids, prompt.max_tokens)), stop) for prompt, ids, stop in rendered]
        return [(prompt, a) for prompt, a, stop in found if a and not any(s in a.text for s in stop)]

    def logits(self, ids: list[int], places: list[int]):
        """Logits of the token that follows each of `places` (ascending): an array (places, vocabulary)."""
        return self._sequences.logits(ids, places)

    def tokenize(self, text: str | list[dict]) -> list[int]:
        """Token ids of a rendered prompt, special tokens parsed, nothing added; of messages, through the file's template."""
        if not isinstance(text, str):
            return self._render(text)[0]
        return self.llama.tokenize(text.encode(), add_bos=False, special=True)

    def close(self) -> None:
        """Give the memory back."""
        self._sequences.close()
        self.llama.close()

    def _render(self, messages: list[dict]) -> tuple[list[int], list[str]]:
        """Token ids and stop texts of a chat, as `create_chat_completion` would complete it."""
        from jinja2 import TemplateError
        from llama_cpp import llama_chat_format

        chat, seen = self.llama.chat_format, _Recorder(self.llama)
        try:
            (self.llama._chat_handlers.get(chat) or llama_chat_format.get_chat_completion_handler(chat))(
                llama=seen, messages=messages, stream=True
            )
        except (ValueError, TemplateError) as error:
            raise SlmError(f"{self.file}: its chat template refuses the messages ({error}).") from None
        return seen.ids, seen.stop

    def _run(self, asked: list[tuple[list[int], list[str], Prompt]]) -> list[Answer]:
        import llama_cpp

        before, jobs = resident_mb(), [self._job(*one) for one in asked]
        fitting = [job for job in jobs if job.limit > 0]
        if first := len(fitting) == 1 and self.memory_mb is None:
            self._sequences.close()  # without the memory of many
        elif len(fitting) > 1:
            for job in fitting:
                job.guess = self._guesses.get(tuple(job.ids), [])[: job.limit]
        try:
            if fitting:
                with tqdm(total=len(fitting), desc=self.name, leave=False, mininterval=1) as bar:
                    self._sequences.run(fitting, common_prefix([job.ids for job in fitting]), bar.update)
        finally:
            for job in jobs:
                if job.grammar:
                    llama_cpp.llama_sampler_free(job.grammar)
        self._mb += resident_mb() - before
        self.memory_mb = max(0.0, self._mb) if first else self.memory_mb
        answers = [self._answer(job, len(fitting) == 1) for job in jobs]
        told = zip(jobs, asked, answers, strict=True)
        self._same |= {(*job.ids, prompt.max_tokens): answer for job, (*_, prompt), answer in told if job.other}
        return answers

    def _job(self, ids: list[int], stop: list[str], prompt: Prompt) -> Job:
        import llama_cpp

        limit = min(prompt.max_tokens, self._context - len(ids))
        job = Job(ids, limit, [s.encode() for s in stop])
        if prompt.temperature:
            self.llama.set_seed(prompt.seed)
            job.sampler = self.llama._init_sampler(
                temp=prompt.temperature, top_p=1.0, repeat_penalty=self._penalty,
                grammar=self._grammar(prompt.schema)[0] if prompt.schema else None,
            )  # fmt: skip
        elif not prompt.schema:
            job.other = self._other
        elif limit > 0:
            job.grammar = llama_cpp.llama_sampler_clone(self._grammar(prompt.schema)[1])
        return job

    def _answer(self, job: Job, lone: bool) -> Answer:
        if job.limit <= 0:
            text = f"[the prompt has {len(job.ids)} tokens, the context {self._context}]"
            return Answer(text, 0.0, len(job.ids), finish_reason="error")
        pieces = job.pieces()
        return Answer(
            "".join(text for text, _ in pieces), job.seconds, len(job.ids), len(job.tokens), job.finish,
            job.first_s if lone else None, pieces,
        )  # fmt: skip

    def _grammar(self, schema: dict):
        """The schema as a grammar, and a sampler to clone. Raises SlmError where the runtime cannot read it: asked
        anyway, it would crash."""
        import llama_cpp
        from llama_cpp.llama_grammar import LlamaGrammar

        text = json.dumps(_inlined(schema), sort_keys=False)
        if text not in self._grammars:
            grammar, vocabulary = LlamaGrammar.from_json_schema(text, verbose=False), self.llama._model.vocab
            sampler = llama_cpp.llama_sampler_init_grammar(vocabulary, grammar._grammar.encode(), b"root")
            if not sampler:
                raise SlmError("the output schema makes no grammar; simplify its `pattern` in task/contract.py.")
            self._grammars[text] = grammar, sampler
        return self._grammars[text]


class _Recorder:
    """Stands in for the runtime in its own chat handlers and keeps what they would complete."""

    verbose = False

    def __init__(self, llama):
        self.tokenize = llama.tokenize

    def create_completion(self, prompt, stop, **_):
        """Keep the token ids and the stop texts of a chat."""
        self.ids, self.stop = prompt, stop
        return iter(())


def _inlined(schema: dict) -> dict:
    """The schema as the grammar builder takes it: no `$ref`, no `discriminator`, `\\d` spelled out."""
    definitions = schema.get("$defs", {})

    def walk(node):
        if isinstance(node, list):
            return [walk(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return walk(definitions[node["$ref"].rsplit("/", 1)[1]])
        if isinstance(node.get("pattern"), str):
            node = {**node, "pattern": node["pattern"].replace("\\d", "[0-9]").replace("\\w", "[A-Za-z0-9_]")}
        kept = {k: v for k, v in node.items() if k not in ("$defs", "discriminator", "title", "description")}
        # Under `properties` the keys are the user's own: a field may well be called "title".
        return {k: {n: walk(p) for n, p in v.items()} if k == "properties" else walk(v) for k, v in kept.items()}

    return walk(schema)
