"""Any OpenAI-compatible endpoint: hosted, llama.cpp's server, Ollama, vLLM, SGLang, LM Studio."""

import asyncio
import os
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from slm.errors import SlmError
from slm.models.base import Answer, Prompt
from slm.rows import digest

BACKOFF_S = 1.0  # first wait after a refusal; doubles each time, 60 s at most


class OpenAIModel:
    """An endpoint asked `concurrency` at a time, at most `requests_per_minute`, and again after 429, 5xx and time-outs.
    `purse` (slm.generate.teacher) is asked for money before each call and told after it what was used."""

    def __init__(self, endpoint, purse=None):
        if not endpoint.url or not endpoint.model:
            raise SlmError("project.yaml: an endpoint needs both `url` and `model` (generate.endpoint, model.larger).")
        self.name, self.endpoint, self.purse = endpoint.model, endpoint, purse
        self.fingerprint = digest(f"{endpoint.url} {endpoint.model}", 16)
        self.calls, self.failed, self.stopped = 0, 0, ""
        self._key, self._next = os.environ.get(endpoint.api_key_env), 0.0
        if "api.openai.com" in endpoint.url and not self._key:
            where = f"the environment variable {endpoint.api_key_env}"
            raise SlmError(f"{endpoint.url}: {where} is not set; export your key first.")

    def answer(self, prompts: list[Prompt]) -> list[Answer]:
        """One answer per prompt, in order. Raises SlmError when a request fails for good."""
        from tqdm.auto import tqdm

        answers: dict[int, Answer] = {}
        with tqdm(total=len(prompts), desc=self.name, leave=False, mininterval=1) as bar:
            run(self.each(prompts, lambda n, answer: (answers.update({n: answer}), bar.update()), patience=1))
        if self.stopped:
            raise SlmError(f"{self.stopped}.")
        return [answers[n] for n in range(len(prompts))]

    async def each(self, prompts: list[Prompt], on_answer: Callable[[int, Answer], None], patience: int = 3) -> None:
        """Answer the prompts; `on_answer(number, answer)` runs once per prompt, never twice at a time; what failed for
        good has finish_reason "error". Ends early (see `stopped`) when the purse is empty or `patience` calls in a row
        failed. Raises SlmError for a refusal that no repetition mends (a wrong key, model or field)."""
        import openai

        end, queue, refused, streak = self.endpoint, list(enumerate(prompts))[::-1], [], 0
        self.stopped = ""

        async def worker(client) -> None:
            nonlocal streak
            while queue and not self.stopped:
                n, prompt = queue.pop()
                try:
                    answer = await self._ask(client, prompt)
                except SlmError as error:  # the others finish the call that they are in: it may be paid for
                    self.stopped = str(error)
                    return refused.append(error)
                if answer is None:
                    return
                streak = streak + 1 if answer.finish_reason == "error" else 0
                self.failed += bool(streak)
                if streak >= patience and not self.stopped:
                    self.stopped = f"endpoint {end.url} ({end.model}): {answer.text}, calls in a row: {streak}"
                on_answer(n, answer)

        options = {"base_url": end.url, "api_key": self._key or "none", "timeout": end.timeout_s, "max_retries": 0}
        async with openai.AsyncOpenAI(**options) as client:
            await asyncio.gather(*(worker(client) for _ in range(min(end.concurrency, len(prompts)))))
        if refused:
            raise refused[0]

    async def _ask(self, client, prompt: Prompt) -> Answer | None:
        import openai

        end, problem, wait = self.endpoint, "", 0.0
        form = {end.max_tokens_name: prompt.max_tokens, "temperature": prompt.temperature}
        if prompt.schema:
            form["response_format"] = {"type": "json_schema", "json_schema": {"name": "output", "schema": prompt.schema}}
        # No tokenizer makes more tokens than the text has bytes; 64 for the chat template.
        most = sum(len(m["content"].encode()) + 16 for m in prompt.messages) + 48, prompt.max_tokens
        for attempt in range(end.retries + 1):
            start = self._next = max(self._next, time.monotonic() + wait)  # a refusal holds every worker back
            self._next += 60 / end.requests_per_minute if end.requests_per_minute else 0
            await asyncio.sleep(start - time.monotonic())
            ticket = await self.purse.reserve(end, *most) if self.purse else None
            if self.purse and not ticket:
                self.stopped = self.stopped or self.purse.empty
            if self.stopped:
                return self._settle(ticket)
            wait = min(60.0, BACKOFF_S * 2**attempt) * (0.5 + random.random())
            self.calls += 1
            begin = time.perf_counter()
            try:
                out = await client.chat.completions.create(model=end.model, messages=prompt.messages, **form)
                text, finish = out.choices[0].message.content or "", out.choices[0].finish_reason or "stop"
            except openai.APIStatusError as error:
                problem, code = f"HTTP {error.status_code}", error.status_code
                self._settle(ticket)
                if code not in (408, 409, 429) and code < 500:
                    said = str(error.message).replace(self._key or "\0", "***")[:200]
                    hint = f"check url, model and {end.api_key_env}"
                    raise SlmError(f"{end.url} ({end.model}): {problem}; {hint} ({said}).") from None
                wait = _retry_after(error.response.headers.get("retry-after"), wait)
            except (AttributeError, IndexError, TypeError):
                problem = "a reply without choices; is the url the one that ends in /v1?"
                self._settle(ticket)
            except (openai.APIConnectionError, ValueError) as error:  # but for a refused connection: perhaps charged
                cause = error.__cause__
                problem = "a reply that is not JSON" if isinstance(error, ValueError) else f"no connection ({cause or error})"
                if isinstance(error, openai.APITimeoutError):
                    problem = f"timed out after {end.timeout_s:g} s"
                free = type(cause).__name__ in ("ConnectError", "ConnectTimeout")
                self._settle(ticket) if free else self._settle(ticket, *most, f"{problem}, counted in full")
            else:
                used = sum(len(m["content"]) for m in prompt.messages) // 3, len(text) // 3
                used = (out.usage.prompt_tokens, out.usage.completion_tokens) if out.usage else used
                self._settle(ticket, *used)
                return Answer(text, time.perf_counter() - begin, *used, finish)
        return Answer(problem, 0.0, finish_reason="error")

    def _settle(self, ticket, *used) -> None:
        if ticket:
            self.purse.settle(ticket, *used)


def run(coroutine):
    """Run a coroutine to its end, inside a notebook's running loop too: on a thread of its own, which ends when the
    cell is stopped."""
    started = []

    async def main():
        started.extend((asyncio.get_running_loop(), asyncio.current_task()))
        return await coroutine

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(asyncio.run, main())
        try:
            return future.result()
        except KeyboardInterrupt:
            if started:
                started[0].call_soon_threadsafe(started[1].cancel)
            raise


def _retry_after(header: str | None, otherwise: float) -> float:
    try:
        return min(300.0, max(0.0, float(header)))
    except (TypeError, ValueError):
        return otherwise
