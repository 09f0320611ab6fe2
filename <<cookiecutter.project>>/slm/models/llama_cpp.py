"""A GGUF file in llama.cpp, in process. Three ways in: messages, rendered text, token ids (to attribute a drop)."""

import json
import time
from pathlib import Path

from tqdm.auto import tqdm

from slm.errors import SlmError
from slm.models.base import Answer, Prompt


class LlamaCppModel:
    """A GGUF file; the prompt's common prefix stays in the runtime's cache between calls."""

    def __init__(self, file: Path, context: int = 2048, threads: int | None = None, repeat_penalty: float = 1.0):
        from slm.registry import file_hash

        file = Path(file)
        if not file.is_file():
            raise SlmError(f"{file}: there is no such GGUF file.")
        import llama_cpp

        try:
            self.llama = llama_cpp.Llama(
                str(file), n_ctx=context, n_threads=threads, n_threads_batch=threads, verbose=False, seed=0
            )
        except ValueError as error:
            raise SlmError(f"{file}: llama.cpp cannot load it ({error}); make it again with 08_export.") from None
        self.name, self.file, self._penalty, self._grammars = file.stem, file, repeat_penalty, {}
        self.fingerprint = f"llama.cpp {llama_cpp.__version__} {file_hash(file)[:16]} ctx{context} rp{repeat_penalty}"

    def answer(self, prompts: list[Prompt]) -> list[Answer]:
        """Messages through the runtime's own chat template; constrained to `schema` where a prompt has one."""
        return [self._chat(prompt) for prompt in tqdm(prompts, desc=self.name, leave=False, mininterval=1)]

    def answer_text(self, text: str | list[int], max_tokens: int, stop: list[str] | None = None) -> Answer:
        """Complete a rendered prompt. Text is tokenized here with special tokens parsed and no BOS added; ids go as they are."""
        ids = self.tokenize(text) if isinstance(text, str) else text
        begin = time.perf_counter()
        out = self.llama.create_completion(
            ids, max_tokens=max_tokens, temperature=0.0, top_p=1.0, repeat_penalty=self._penalty, stop=stop or []
        )
        return self._answer(out["choices"][0]["text"], out, begin)

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a rendered prompt: special tokens parsed, nothing added."""
        return self.llama.tokenize(text.encode(), add_bos=False, special=True)

    def close(self) -> None:
        """Give the memory back."""
        self.llama.close()

    def _chat(self, prompt: Prompt) -> Answer:
        grammar = self._grammar(prompt.schema) if prompt.schema else None
        begin = time.perf_counter()
        try:
            out = self.llama.create_chat_completion(
                prompt.messages, max_tokens=prompt.max_tokens, temperature=prompt.temperature, top_p=1.0,
                repeat_penalty=self._penalty, grammar=grammar, seed=prompt.seed,
            )  # fmt: skip
        except ValueError as error:  # a prompt longer than the context
            return Answer(f"[{error}]", time.perf_counter() - begin, finish_reason="error")
        return self._answer(out["choices"][0]["message"]["content"] or "", out, begin)

    def _grammar(self, schema: dict):
        """The schema as a grammar. Raises SlmError where the runtime cannot read it: asked anyway, it would crash."""
        import llama_cpp
        from llama_cpp.llama_grammar import LlamaGrammar

        text = json.dumps(_inlined(schema), sort_keys=False)
        if text not in self._grammars:
            grammar = LlamaGrammar.from_json_schema(text, verbose=False)
            vocabulary = llama_cpp.llama_model_get_vocab(self.llama.model)
            sampler = llama_cpp.llama_sampler_init_grammar(vocabulary, grammar._grammar.encode(), b"root")
            if not sampler:
                raise SlmError("the output schema cannot be turned into a grammar; simplify its `pattern` in task/contract.py.")
            llama_cpp.llama_sampler_free(sampler)
            self._grammars[text] = grammar
        return self._grammars[text]

    @staticmethod
    def _answer(text: str, out: dict, begin: float) -> Answer:
        usage = out["usage"]
        return Answer(
            text, time.perf_counter() - begin, usage["prompt_tokens"], usage["completion_tokens"],
            out["choices"][0]["finish_reason"] or "stop",
        )  # fmt: skip


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
