"""Answers remembered by model fingerprint and prompt, so that a second run is quick and a killed one resumes."""

import hashlib
import json
import sqlite3
import time
from contextlib import closing
from dataclasses import asdict
from functools import partial

from slm import cost
from slm.models.base import Answer, Model, Prompt


class CachedModel:
    """A model whose answers are kept in `.cache/answers.sqlite`; the latency of a kept answer is that of its making. Of a
    prompt only the hash is kept: nothing tells whom an answer is about, so a deletion takes the whole file."""

    def __init__(self, model: Model, path, chunk: int = 128, book=lambda answers, seconds: None):
        self.name, self.fingerprint, self._model, self._path, self._chunk = model.name, model.fingerprint, model, path, chunk
        self._book = book  # told of new answers and the seconds that they took
        path.parent.mkdir(parents=True, exist_ok=True)

    def answer(self, prompts: list[Prompt]) -> list[Answer]:
        """One answer per prompt; only unknown prompts reach the model, chunk by chunk, each chunk kept at once."""
        keys = [self._key(prompt) for prompt in prompts]
        with closing(sqlite3.connect(self._path, timeout=60)) as store:
            store.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL)")
            known = {}
            for key in keys:
                row = store.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
                if row:
                    known[key] = Answer(**json.loads(row[0]))
            missing = list({k: p for k, p in zip(keys, prompts, strict=True) if k not in known}.items())
            # Longest first within the whole request, so that a chunk's batches are of like length.
            missing.sort(key=lambda item: -sum(len(m["content"]) for m in item[1].messages))
            for start in range(0, len(missing), self._chunk):
                part = missing[start : start + self._chunk]
                begin = time.perf_counter()
                answers = self._model.answer([prompt for _, prompt in part])
                took = time.perf_counter() - begin
                for (key, _), answer in zip(part, answers, strict=True):
                    known[key] = answer
                    if answer.finish_reason != "error":
                        line = json.dumps(asdict(answer), ensure_ascii=False)
                        store.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, line))
                store.commit()
                self._book(answers, took)
        return [known[key] for key in keys]

    def _key(self, prompt: Prompt) -> str:
        body = json.dumps([self.fingerprint, prompt.messages, prompt.max_tokens, prompt.schema], sort_keys=True)
        return hashlib.sha256(body.encode()).hexdigest()


def cached(model: Model, settings) -> CachedModel:
    """`model` behind the project's answer cache; what new answers cost goes into the ledger."""
    return CachedModel(model, settings.path(".cache/answers.sqlite"), book=partial(cost.answered, settings, model))
