"""A teacher behind any OpenAI-compatible endpoint: concurrent, retried, remembered on disk, within a hard budget."""

import asyncio
import hashlib
import json
import os
import random
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass

from slm import cost
from slm.errors import SlmError

BACKOFF_S = 1.0  # first wait after a refusal; doubles each time, 60 s at most


@dataclass(frozen=True)
class Job:
    """One call: `key` tells calls apart, `facts` come back with the reply."""

    key: str
    prompt: str
    max_tokens: int
    facts: dict


@dataclass(frozen=True)
class Reply:
    """What the teacher wrote; `cached` replies were paid for earlier."""

    job: Job
    text: str
    finish: str = "stop"
    cached: bool = False


class Store:
    """Replies on disk. `used` turns true once the rows of a reply stand in a batch file."""

    def __init__(self, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.db = sqlite3.connect(path, timeout=60, check_same_thread=False)
        self.db.execute(
            "CREATE TABLE IF NOT EXISTS replies"
            " (n INTEGER PRIMARY KEY, key TEXT, job TEXT, text TEXT, finish TEXT, used INT)"
        )

    def put(self, job: Job, text: str, finish: str) -> None:
        """Keep a reply before anything else is done with it."""
        body = json.dumps([job.prompt, job.max_tokens, job.facts])
        with self.db:
            self.db.execute("INSERT INTO replies VALUES (NULL, ?, ?, ?, ?, 0)", (job.key, body, text, finish))

    def get(self, key: str) -> list[tuple[str, str]]:
        """(text, finish) of the replies to a call, oldest first."""
        return self.db.execute("SELECT text, finish FROM replies WHERE key = ? ORDER BY n", (key,)).fetchall()

    def unused(self) -> list[Reply]:
        """Replies of a killed run whose rows never reached a batch file."""
        found = self.db.execute("SELECT key, job, text, finish FROM replies WHERE used = 0 ORDER BY n").fetchall()
        return [Reply(Job(key, *json.loads(job)), text, finish, cached=True) for key, job, text, finish in found]

    def use(self, key: str) -> None:
        """Mark the replies to a call as written."""
        with self.db:
            self.db.execute("UPDATE replies SET used = 1 WHERE key = ?", (key,))


class Teacher:
    """The endpoint of `settings.generate`. Raises SlmError when url, model or key is missing."""

    def __init__(self, settings, store: Store):
        end = settings.generate.endpoint
        if not end.url or not end.model:
            raise SlmError("project.yaml: generate.endpoint needs `url` and `model` when generate.teacher is openai.")
        if "api.openai.com" in end.url and not os.environ.get(end.api_key_env):
            raise SlmError(f"{end.url}: the environment variable {end.api_key_env} is not set; export your key first.")
        self.settings, self.end, self.store = settings, end, store
        # Money is reserved at the worst case before a call and settled after it, so the budget is never passed.
        self.spent, self.reserved = cost.spent(settings, "teacher_generation_cost"), 0.0
        self.stopped, self.failures, self.calls = "", [], 0

    def key(self, prompt: str, part: int) -> str:
        """The identity of a call: endpoint, model, temperature, prompt and its number among equals."""
        body = json.dumps([self.end.url, self.end.model, self.settings.generate.temperature, prompt, part])
        return hashlib.sha256(body.encode()).hexdigest()[:24]

    async def ask_all(self, jobs: list[Job], on_reply: Callable[[Reply], None]) -> None:
        """Answer the jobs, `concurrency` at a time; `on_reply` runs once per reply, never twice at a time. Stops early
        (see `stopped`) when the budget would be passed or three calls in a row fail for good."""
        import openai

        queue = list(reversed(jobs))
        key = os.environ.get(self.end.api_key_env) or "none"
        async with openai.AsyncOpenAI(
            base_url=self.end.url, api_key=key, timeout=self.end.timeout_s, max_retries=0
        ) as client:

            async def worker() -> None:
                while queue and not self.stopped:
                    job = queue.pop()
                    reply = await self._ask(client, job)
                    if reply:
                        on_reply(reply)

            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(self.end.concurrency, len(jobs))):
                        group.create_task(worker())
            except* SlmError as errors:
                raise errors.exceptions[0] from None

    def _money(self, tokens_in: int, tokens_out: int) -> float:
        return cost.token_money(tokens_in, tokens_out, self.end.usd_per_1m_input, self.end.usd_per_1m_output)

    def _book(self, tokens_in: int, tokens_out: int, **facts) -> None:
        money = self._money(tokens_in, tokens_out)
        self.spent += money
        facts = {"tokens_in": tokens_in, "tokens_out": tokens_out, "model": self.end.model, **facts}
        cost.add(self.settings, "teacher_generation_cost", money, **facts)

    async def _ask(self, client, job: Job) -> Reply | None:
        import openai

        # No tokenizer makes more tokens than the text has bytes; 64 for the chat template.
        most, limit = len(job.prompt.encode()) + 64, self.settings.generate.budget_usd
        worst = self._money(most, job.max_tokens)
        problem, wait = "", 0.0
        for attempt in range(self.end.retries + 1):
            if attempt:
                await asyncio.sleep(wait)
            while not self.stopped and self.spent + self.reserved + worst > limit + 1e-12 and self.reserved > 1e-12:
                await asyncio.sleep(0.02)  # calls in flight mostly cost less than they reserved
            if not self.stopped and self.spent + self.reserved + worst > limit + 1e-12:
                spent = f"{self.spent:.4f} of {limit:.2f} spent"
                self.stopped = f"budget: {spent}, the next call could pass generate.budget_usd"
            if self.stopped:
                return None
            self.reserved += worst
            wait = min(60.0, BACKOFF_S * 2**attempt) * (0.5 + random.random())
            self.calls += 1
            try:
                out = await client.chat.completions.create(
                    model=self.end.model, messages=[{"role": "user", "content": job.prompt}],
                    max_tokens=job.max_tokens, temperature=self.settings.generate.temperature,
                )  # fmt: skip
            except openai.APITimeoutError:
                # The provider may have charged for it: count the worst case.
                self._book(most, job.max_tokens, note="timed out, counted in full")
                problem = f"no answer within {self.end.timeout_s:g} s"
            except openai.APIStatusError as error:
                problem = f"HTTP {error.status_code}"
                if error.status_code != 429 and error.status_code < 500:
                    hint = f"check url, model and {self.end.api_key_env}"
                    raise SlmError(f"{self.end.url} ({self.end.model}): {problem}; {hint}.") from None
                wait = _retry_after(error.response.headers.get("retry-after"), wait)
            except openai.APIConnectionError as error:
                problem = f"no connection ({error.__cause__ or error})"
            except ValueError:
                problem = "a reply that is not JSON"
            else:
                if not isinstance(out, str) and out.choices:
                    text, finish = out.choices[0].message.content or "", out.choices[0].finish_reason or "stop"
                    self.store.put(job, text, finish)
                    guess = (len(job.prompt) // 3, len(text) // 3)
                    self._book(*((out.usage.prompt_tokens, out.usage.completion_tokens) if out.usage else guess))
                    self.failures.append("")
                    return Reply(job, text, finish)
                problem = "a reply without choices; is the url the one that ends in /v1?"
            finally:
                self.reserved -= worst
        self.failures.append(problem)
        if len(self.failures) >= 3 and all(self.failures[-3:]):
            self.stopped = self.stopped or f"endpoint {self.end.url}: {problem}, three calls in a row"
        return None


def _retry_after(header: str | None, otherwise: float) -> float:
    try:
        return min(60.0, max(0.0, float(header)))
    except (TypeError, ValueError):
        return otherwise
