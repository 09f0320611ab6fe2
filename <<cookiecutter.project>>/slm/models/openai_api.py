"""Any OpenAI-compatible endpoint: hosted, llama.cpp's server, Ollama, vLLM, SGLang, LM Studio."""

import asyncio
import hashlib
import os
import time

from tqdm.auto import tqdm

from slm.errors import SlmError
from slm.models.base import Answer, Prompt


class OpenAIModel:
    """An endpoint driven with concurrency; retries are the client's (429, 5xx, time-outs, with backoff)."""

    def __init__(self, endpoint):
        if not endpoint.url or not endpoint.model:
            raise SlmError("endpoint: set both `url` and `model` in project.yaml.")
        self.name, self._endpoint = endpoint.model, endpoint
        self.fingerprint = hashlib.sha256(f"{endpoint.url} {endpoint.model}".encode()).hexdigest()[:16]

    def answer(self, prompts: list[Prompt]) -> list[Answer]:
        """One answer per prompt, in order. Raises SlmError when the endpoint refuses the first failing request."""
        return run(self._all(prompts))

    async def _all(self, prompts: list[Prompt]) -> list[Answer]:
        import openai

        end = self._endpoint
        key = os.environ.get(end.api_key_env) or "none"
        gate = asyncio.Semaphore(end.concurrency)
        async with openai.AsyncOpenAI(
            base_url=end.url, api_key=key, timeout=end.timeout_s, max_retries=end.retries
        ) as client:
            with tqdm(total=len(prompts), desc=self.name, leave=False, mininterval=1) as bar:

                async def one(prompt: Prompt) -> Answer:
                    async with gate:
                        answer = await self._one(client, prompt)
                    bar.update()
                    return answer

                try:
                    return await asyncio.gather(*(one(p) for p in prompts))
                except openai.APIError as error:
                    status = getattr(error, "status_code", "")
                    problem = f"{type(error).__name__} {status}".strip()
                    raise SlmError(f"{end.url} ({end.model}): {problem}; check url, model and {end.api_key_env}.") from None

    async def _one(self, client, prompt: Prompt) -> Answer:
        form = {}
        if prompt.schema:
            named = {"name": "output", "schema": prompt.schema}
            form["response_format"] = {"type": "json_schema", "json_schema": named}
        begin = time.perf_counter()
        out = await client.chat.completions.create(
            model=self._endpoint.model, messages=prompt.messages, max_tokens=prompt.max_tokens, temperature=0, **form
        )
        choice, usage = out.choices[0], out.usage
        return Answer(
            choice.message.content or "", time.perf_counter() - begin, usage.prompt_tokens if usage else 0,
            usage.completion_tokens if usage else 0, choice.finish_reason or "stop",
        )  # fmt: skip


def run(coroutine):
    """Run a coroutine to its end, inside a notebook's running loop too (there on a thread of its own)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()
