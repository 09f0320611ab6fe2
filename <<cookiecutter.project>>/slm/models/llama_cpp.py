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
        self.name, self.file, self._penalty = file.stem, file, repeat_penalty
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
        form = {"type": "json_object", "schema": _inlined(prompt.schema)} if prompt.schema else None
        begin = time.perf_counter()
        try:
            out = self.llama.create_chat_completion(
                prompt.messages, max_tokens=prompt.max_tokens, temperature=0.0, top_p=1.0,
                repeat_penalty=self._penalty, response_format=form,
            )  # fmt: skip
        except ValueError as error:  # a prompt longer than the context
            return Answer(f"[{error}]", time.perf_counter() - begin, finish_reason="error")
        return self._answer(out["choices"][0]["message"]["content"] or "", out, begin)

    @staticmethod
    def _answer(text: str, out: dict, begin: float) -> Answer:
        usage = out["usage"]
        return Answer(
            text, time.perf_counter() - begin, usage["prompt_tokens"], usage["completion_tokens"],
            out["choices"][0]["finish_reason"] or "stop",
        )  # fmt: skip


def _inlined(schema: dict) -> dict:
    """The schema without `$ref` and `discriminator`, which the grammar builder does not take everywhere."""
    definitions = schema.get("$defs", {})

    def walk(node):
        if isinstance(node, dict):
            if "$ref" in node:
                return walk(definitions[node["$ref"].rsplit("/", 1)[1]])
            return {k: walk(v) for k, v in node.items() if k not in ("$defs", "discriminator", "title", "description")}
        return [walk(item) for item in node] if isinstance(node, list) else node

    return json.loads(json.dumps(walk(schema)))
