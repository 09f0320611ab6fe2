"""Who writes rows: endpoints or a local GGUF file. Replies are remembered on disk, money is kept within a hard budget."""

import asyncio
import json
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from slm import cost, registry
from slm.errors import SlmError
from slm.models.base import Answer, Prompt
from slm.models.llama_cpp import LlamaCppModel
from slm.models.openai_api import OpenAIModel
from slm.sections import Endpoint

FILE = ".cache/teacher.sqlite"
LOCAL_ROWS = 4  # rows per call of a local teacher: a small model loses the thread after that


@dataclass(frozen=True)
class Job:
    """One call: `key` tells calls apart, `facts` come back with the reply."""

    key: str
    prompt: str
    max_tokens: int
    facts: dict

    @property
    def teacher(self) -> str:
        """Whom it goes to."""
        return self.facts["meta"]["provenance"]["teacher"]


def endpoints(settings) -> dict[str, Endpoint]:
    """The teachers by name, with their prices; a local file has none. Raises SlmError where a setting is missing."""
    own = settings.generate
    if own.teacher == "gguf" and not own.gguf:
        raise SlmError("project.yaml: generate.gguf needs the path of the teacher's file when generate.teacher is gguf.")
    if own.teacher != "openai":
        return {Path(own.gguf).name if own.teacher == "gguf" else "recorded": Endpoint()}
    ends = [end for end in (own.endpoint, *own.endpoints) if end != Endpoint()] or [own.endpoint]
    named = {end.model: end for end in ends}
    if len(named) < len(ends):
        raise SlmError("project.yaml: two of generate.endpoint and generate.endpoints name the same model; keep one.")
    if any(not end.url or not end.model for end in ends):
        raise SlmError("project.yaml: generate.endpoint needs `url` and `model` when generate.teacher is openai.")
    return named


def teachers(settings, purse: "Purse") -> list:
    """The models behind `endpoints`, ready to be asked; each has name, fingerprint, answer() and each()."""
    local = settings.generate.teacher == "gguf"
    return [LocalTeacher(settings, purse) if local else OpenAIModel(end, purse) for end in endpoints(settings).values()]


class LocalTeacher(LlamaCppModel):
    """A GGUF file as the teacher, one call at a time, without fee."""

    def __init__(self, settings, purse: "Purse"):
        file = Path(settings.generate.gguf).expanduser()
        super().__init__(file if file.is_absolute() else settings.root / file, context=settings.generate.context)
        self.name, self._purse = file.name, purse
        self.calls, self.failed, self.stopped = 0, 0, ""

    async def each(self, prompts: list[Prompt], on_answer: Callable[[int, Answer], None]) -> None:
        """Answer the prompts in order. Raises SlmError when one is too long for the context."""
        for n, prompt in enumerate(prompts):
            answer = self.answer([prompt])[0]
            self.calls += 1
            if answer.finish_reason == "error":
                raise SlmError(f"{self.file}: {answer.text}; raise generate.context, or lower generate.batch_rows.")
            self._purse.book(self.name, 0.0, answer.prompt_tokens, answer.completion_tokens)
            on_answer(n, answer)
            await asyncio.sleep(0)


class Store:
    """Replies on disk. `used` turns true once the rows of a reply stand in a batch file."""

    def __init__(self, settings):
        self.db = _open(settings, "replies (n INTEGER PRIMARY KEY, key TEXT, job TEXT, text TEXT, used INT)")

    def put(self, job: Job, text: str) -> None:
        """Keep a reply before anything else is done with it."""
        body = json.dumps([job.prompt, job.max_tokens, job.facts])
        with self.db:
            storable = text.encode("utf-8", "backslashreplace").decode()  # an emoji cut in two is not
            self.db.execute("INSERT INTO replies VALUES (NULL, ?, ?, ?, 0)", (job.key, body, storable))

    def get(self, key: str) -> list[str]:
        """The replies to a call, oldest first."""
        return [text for (text,) in self.db.execute("SELECT text FROM replies WHERE key = ? ORDER BY n", (key,))]

    def unused(self) -> list[tuple[Job, str]]:
        """Replies of a killed run whose rows never reached a batch file."""
        found = self.db.execute("SELECT key, job, text FROM replies WHERE used = 0 ORDER BY n").fetchall()
        return [(Job(key, *json.loads(job)), text) for key, job, text in found]

    def use(self, key: str) -> None:
        """Mark the replies to a call as written."""
        with self.db:
            self.db.execute("UPDATE replies SET used = 1 WHERE key = ?", (key,))


class Purse:
    """`generate.budget_usd`, as a context: one run at a time holds it. The worst case of a call is reserved before it,
    on disk too, and settled after it; calls that a killed run left in flight are booked in full."""

    def __init__(self, settings):
        self.settings, self.batch, self.empty, self.reserved = settings, "", "", 0.0

    def __enter__(self) -> "Purse":
        from filelock import Timeout

        self._lock = registry.locked(self.settings, "teacher", timeout=0)
        try:
            self._lock.acquire()
        except Timeout:
            raise SlmError("another run is at work with the teacher (03); wait for it, or stop it, then run again.") from None
        self._db = _open(self.settings, "flights (n INTEGER PRIMARY KEY, body TEXT)")
        self.spent = cost.spent(self.settings, "teacher_generation_cost")
        for n, body in self._db.execute("SELECT n, body FROM flights").fetchall():
            self.book(*json.loads(body), note="in flight when a run was stopped, counted in full")
            self._land(n)
        return self

    def __exit__(self, *_) -> None:
        self._db.close()
        self._lock.release()

    async def reserve(self, end: Endpoint, tokens_in: int, tokens_out: int):
        """A ticket for a call of at most so many tokens; None when it could pass the budget (see `empty`)."""
        worst, limit = cost.token_money(end, tokens_in, tokens_out), self.settings.generate.budget_usd + 1e-12
        while self.reserved > 1e-12 and self.spent + self.reserved + worst > limit:
            await asyncio.sleep(0.02)  # calls in flight mostly cost less than they reserved
        if self.spent + worst > limit:
            self.empty = f"budget: {self.spent:.4f} of {limit:.2f} spent, the next call could pass generate.budget_usd"
            return None
        self.reserved += worst
        body = json.dumps([end.model, worst, tokens_in, tokens_out])
        with self._db:
            return self._db.execute("INSERT INTO flights VALUES (NULL, ?)", (body,)).lastrowid, end, worst

    def settle(self, ticket, tokens_in: int = 0, tokens_out: int = 0, note: str = "") -> None:
        """Book what a call really used; nothing for a call that was refused."""
        n, end, worst = ticket
        self.reserved -= worst
        if tokens_in or tokens_out:
            self.book(end.model, cost.token_money(end, tokens_in, tokens_out), tokens_in, tokens_out, note)
        self._land(n)

    def book(self, model: str, money: float, tokens_in: int, tokens_out: int, note: str = "") -> None:
        """One line of the ledger."""
        facts = {"tokens_in": tokens_in, "tokens_out": tokens_out, "model": model, "batch": self.batch}
        cost.add(self.settings, "teacher_generation_cost", money, **facts, **({"note": note} if note else {}))
        self.spent += money

    def _land(self, n: int) -> None:
        with self._db:
            self._db.execute("DELETE FROM flights WHERE n = ?", (n,))


def _open(settings, table: str) -> sqlite3.Connection:
    path = settings.path(FILE)
    path.parent.mkdir(parents=True, exist_ok=True)
    db = sqlite3.connect(path, timeout=60, check_same_thread=False)
    db.execute(f"CREATE TABLE IF NOT EXISTS {table}")
    return db

