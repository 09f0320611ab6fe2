"""Retrieval for the RAG baseline: passages of data/raw, found by TF-IDF, in front of the last message."""

import json
import textwrap
from dataclasses import replace

from slm.errors import SlmError
from slm.models.base import Answer, Model, Prompt
from slm.rows import digest

WORDS = 120  # a passage ends with the line that fills it


def read_passages(settings) -> list[tuple[str, str]]:
    """(name, text) of every passage of data/raw/*.md and *.txt; a Markdown heading begins a new one. Raises SlmError
    when there is no document."""
    passages = []
    for file in sorted(f for f in settings.path("data/raw").glob("*") if f.suffix in (".md", ".txt")):
        parts: list[str] = []
        for line in file.read_text(encoding="utf-8").splitlines():
            for piece in textwrap.wrap(line, 1000):
                if not parts or piece.startswith("#") or len(parts[-1].split()) >= WORDS:
                    parts.append(piece)
                else:
                    parts[-1] += f"\n{piece}"
        passages += [(f"{file.name} {n}", part) for n, part in enumerate(parts, 1)]
    if not passages:
        advice = "put the documents there, or set task.needs_knowledge: false in project.yaml"
        raise SlmError(f"data/raw: the task needs knowledge, and no .md or .txt file is there; {advice}.")
    return passages


class RetrievingModel:
    """`model` with the `count` passages most like the last user message in front of that message."""

    def __init__(self, model: Model, passages: list[tuple[str, str]], count: int):
        from sklearn.feature_extraction.text import TfidfVectorizer

        self._model, self._passages, self._count = model, passages, count
        self._features = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\w+")
        self._table = self._features.fit_transform([text for _, text in passages])
        mark = digest(json.dumps(passages))
        self.name, self.fingerprint = f"{model.name} with retrieval", f"{model.fingerprint} rag {mark} {count}"

    @property
    def memory_mb(self) -> float | None:
        """What the model itself takes."""
        return self._model.memory_mb

    def find(self, text: str) -> list[tuple[str, str]]:
        """The passages nearest to a text, best first; those that share no word with it are left out."""
        near = (self._table @ self._features.transform([text]).T).toarray()[:, 0]
        return [self._passages[n] for n in near.argsort()[::-1][: self._count] if near[n] > 0]

    def answer(self, prompts: list[Prompt]) -> list[Answer]:
        """One answer per prompt, in order."""
        return self._model.answer([replace(prompt, messages=self._informed(prompt.messages)) for prompt in prompts])

    def _informed(self, messages: list[dict]) -> list[dict]:
        *before, last = messages
        found = "\n\n".join(f"[{name}]\n{text}" for name, text in self.find(last["content"]))
        text = f"Documents:\n\n{found}\n\nMessage:\n\n{last['content']}" if found else last["content"]
        return [*before, {**last, "content": text}]
