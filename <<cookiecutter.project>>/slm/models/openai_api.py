"""Any OpenAI-compatible endpoint: hosted, llama.cpp's server, Ollama, vLLM, SGLang, LM Studio."""

import asyncio
import hashlib
import os
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from slm.errors import SlmError
from slm.models.base import Answer, Prompt

BACKOFF_S = 1.0  # first wait after a refusal; doubles each time, 60 s at most


class OpenAIModel:
    """An endpoint asked `concurrency` at a time, at most `requests_per_minute`, and again after 429, 5xx and time-outs.
    `purse` (slm.generate.teacher) is asked for money before each call and told after it what was used."""

    def __init__(self, endpoint, purse=None):
        if not endpoint.url or not endpoint.model:
            raise SlmError("project.yaml: an endpoint needs both `url` and `model` (generate.endpoint, model.larger).")
        self.name, self.endpoint, self.purse = endpoint.model, endpoint, purse
        self.fingerprint = hashlib.sha256(f"{endpoint.url} {endpoint.model}".encode()).hexdigest()[:16]
        self.calls, self.failed, self.stopped = 0, 0, ""
        self._key, self._next, self._streak = os.environ.get(endpoint.api_key_env), 0.0, 0
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

        queue, refused, self.stopped, self._streak = list(enumerate(prompts))[::-1], [], "", 0
        end = self.endpoint
        async with openai.AsyncOpenAI(
            base_url=end.url, api_key=self._key or "none", timeout=end.timeout_s, max_retries=0
        ) as client:

            async def worker() -> None:
                while queue and not self.stopped:
                    n, prompt = queue.pop()
                    try:
                        answer = await self._ask(client, prompt)
                    except SlmError as error:  # the others finish the call that they are in: it may be paid for
                        self.stopped = str(error)
                        refused.append(error)
                        return
                    if answer is None:
                        return
                    self._streak = self._streak + 1 if answer.finish_reason == "error" else 0
                    self.failed += bool(self._streak)
                    if self._streak >= patience and not self.stopped:
                        again = f", {patience} calls in a row" if patience > 1 else ""
                        self.stopped = f"endpoint {end.url} ({end.model}): {answer.text}{again}"
                    on_answer(n, answer)

            async with asyncio.TaskGroup() as group:
                for _ in range(min(end.concurrency, len(prompts))):
                    group.create_task(worker())
        if refused:
            raise refused[0]

    async def _ask(self, client, prompt: Prompt) -> Answer | None:
        import httpx
        import openai

        end, problem, wait = self.endpoint, "", 0.0
        form = {end.max_tokens_name: prompt.max_tokens, "temperature": prompt.temperature}
        if prompt.schema:
            form["response_format"] = {"type": "json_schema", "json_schema": {"name": "output", "schema": prompt.schema}}
        # No tokenizer makes more tokens than the text has bytes; 16 a message for the chat template.
        most = sum(len(m["content"].encode()) + 16 for m in prompt.messages) + 48
        for attempt in range(end.retries + 1):
            self._next = max(self._next, time.monotonic() + wait)
            start, gap = self._next, 60 / end.requests_per_minute if end.requests_per_minute else 0.0
            self._next += gap
            await asyncio.sleep(start - time.monotonic())
            ticket = await self.purse.reserve(end, most, prompt.max_tokens) if self.purse else None
            if self.purse and ticket is None:
                self.stopped = self.stopped or self.purse.empty
            if self.stopped:
                return self._settle(ticket)
            wait = min(60.0, BACKOFF_S * 2**attempt) * (0.5 + random.random())
            self.calls += 1
            begin, full = time.perf_counter(), {"tokens_in": most, "tokens_out": prompt.max_tokens}
            try:
                out = await client.chat.completions.create(model=end.model, messages=prompt.messages, **form)
                text, finish = out.choices[0].message.content or "", out.choices[0].finish_reason or "stop"
            except openai.APITimeoutError:
                problem = f"no answer within {end.timeout_s:g} s"  # the provider may have charged for it
                self._settle(ticket, **full, note="timed out, counted in full")
            except openai.APIStatusError as error:
                problem = f"HTTP {error.status_code}"
                self._settle(ticket)
                if error.status_code not in (408, 409, 429) and error.status_code < 500:
                    said = str(error.message).replace(self._key or "\0", "***")[:200]
                    hint = f"check url, model and {end.api_key_env}"
                    raise SlmError(f"{end.url} ({end.model}): {problem}; {hint} ({said}).") from None
                wait = _retry_after(error.response.headers.get("retry-after"), wait)
            except openai.APIConnectionError as error:
                problem = f"no connection ({error.__cause__ or error})"
                reached = not isinstance(error.__cause__, httpx.ConnectError)
                self._settle(ticket, **full, note="cut off, counted in full") if reached else self._settle(ticket)
            except ValueError:
                problem = "a reply that is not JSON"
                self._settle(ticket, **full, note="unreadable, counted in full")
            except (AttributeError, IndexError, TypeError):
                problem = "a reply without choices; is the url the one that ends in /v1?"
                self._settle(ticket)
            else:
                guess = (sum(len(m["content"]) for m in prompt.messages) // 3, len(text) // 3)
                used = (out.usage.prompt_tokens, out.usage.completion_tokens) if out.usage else guess
                self._settle(ticket, *used)
                return Answer(text, time.perf_counter() - begin, *used, finish)
        return Answer(problem, 0.0, finish_reason="error")

    def _settle(self, ticket, tokens_in: int = 0, tokens_out: int = 0, note: str = "") -> None:
        if ticket:
            self.purse.settle(ticket, tokens_in, tokens_out, note)


def run(coroutine):
    """Run a coroutine to its end, inside a notebook's running loop too: there on a thread of its own, which ends when
    the cell is stopped."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    started = []

    async def main():
        started.append((asyncio.get_running_loop(), asyncio.current_task()))
        return await coroutine

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(asyncio.run, main())
        try:
            return future.result()
        except BaseException:
            for loop, task in started:
                if not loop.is_closed():
                    loop.call_soon_threadsafe(task.cancel)
            raise


def _retry_after(header: str | None, otherwise: float) -> float:
    try:
        return min(300.0, max(0.0, float(header)))
    except (TypeError, ValueError):
        return otherwise
