"""A plain function as a model: the rule baseline, the majority class."""

import time
from collections.abc import Callable

from slm.models.base import Answer, Prompt


class ProgramModel:
    """Answers with `predict(user_text) -> text`."""

    def __init__(self, name: str, predict: Callable[[str], str], fingerprint: str = ""):
        self.name, self.fingerprint, self._predict = name, fingerprint or f"program:{name}", predict

    def answer(self, prompts: list[Prompt]) -> list[Answer]:
        """One answer per prompt, from its last user message."""
        answers = []
        for prompt in prompts:
            user = next(m["content"] for m in reversed(prompt.messages) if m["role"] == "user")
            begin = time.perf_counter()
            text = self._predict(user)
            answers.append(Answer(text, time.perf_counter() - begin))
        return answers
