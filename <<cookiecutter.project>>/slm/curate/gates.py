"""The gates that judge a row by itself: pure functions, rows -> one verdict (or None) per row."""

import re
from collections.abc import Callable
from functools import lru_cache

from slm.curate.read import Verdict
from slm.curate.text import text_of, words
from slm.errors import SlmError
from slm.rows import Row

Verdicts = list[Verdict | None]

# What a generator says about its own work. In answers everything counts; in messages only what no customer writes,
# for an adversarial message may well speak of prompts and instructions.
_LEAK_ANY = re.compile(
    r"\b(as an ai\b|(synthetic|training|fine-?tuning) (data|example|row|sample|set)|teacher model|student model"
    r"|(this|the following|another|next) (example|row|sample) (is|tests|shows|teaches|covers|should)"
    r"|(here (is|are)|here's) (a|an|another|the|your|\d+)\b[^.\n]{0,40}\b(example|row|sample|jsonl)s?\b"
    r"|(near.?miss|schema.?repair|adversarial|boundary|canonical) (case|example|row)|(category|difficulty|kind)\s*[:= ]\s*"
    r"(easy|medium|hard|canonical|boundary|negative|adversarial|near.?miss|schema.?repair)|generation (prompt|instructions)"
    r"|per the (rubric|instructions|prompt|schema)|according to the (rubric|prompt|schema)|(scoring|grading|quality) rubric"
    r"|synthetic (customer |user |support )?(message|request|ticket|input)|generated (message|example|row|request|ticket) (no\b|#|\d)"
    r"|the following (message|text|input|request|ticket) (should|must|is to) be (labell?ed|classified|categori[sz]ed|tagged)"
    r"|(a|an|writing) (realistic|diverse|production-like) (request|message|example|input|row)|output contract)",
    re.IGNORECASE,
)  # fmt: skip
_LEAK_ANSWER = re.compile(
    r"\b(system prompt|the prompt|my instructions|hidden rules?|rubric|teacher|as (requested|instructed)|jsonl)\b", re.IGNORECASE
)
# Each alternative of _LEAK_ANY holds one of these: plain text without any need not be searched.
_LEAK_HINTS = (
    "as an ai", "synthetic ", "training ", "tuning ", "teacher model", "student model", "example", "row ", "sample", "rows",
    "jsonl", "miss", "repair", "adversarial", "boundary", "canonical", "category", "difficulty", "kind", "generation ",
    "per the ", "rubric", "realistic", "diverse", "production-like", "output contract", "according to the ", "generated ",
    "the following ",
)  # fmt: skip
_PLACEHOLDER = re.compile(
    r"\{\{?\s*\w+\s*\}?\}|\[(your |customer |company |product )?(name|company|date|number|email|order id|product)\]"
    r"|<(name|company|date|number|email|order_id|product)>|lorem ipsum",
    re.IGNORECASE,
)


def read_answer(answer: str, contract) -> tuple[Verdict | None, dict | None]:
    """Gates 1 to 3 on one answer, and the value read from it. json_validity: it holds no JSON. schema_validity: a field
    is missing, unknown or has a value that is not allowed. contract_validity: the JSON is right, but the answer is not
    exactly that (prose or a code fence around it)."""
    try:
        strict = contract.parse(answer)
    except RecursionError:
        return Verdict("json_validity", "the answer is nested too deeply", {"answer": answer[:300]}), None
    if strict.stage == "schema":
        evidence = {"field": strict.error.split(":")[0][:100]}
        return Verdict("schema_validity", f"the answer breaks the contract: {strict.error[:500]}", evidence), None
    if strict.error and contract.parse(answer[:20_000], lenient=True).error is None:
        return Verdict("contract_validity", "text around the JSON of the answer", {"answer": answer[:300]}), None
    if strict.error:
        return Verdict("json_validity", f"the answer is {strict.error[:500]}", {"answer": answer[:300]}), None
    return None, strict.value


def leaked(rows: list[Row], said: list[list[str]], secret: frozenset[str] = frozenset()) -> Verdicts:
    """Gate 4: no trace of the making, nor a run of seven words that stands in `secret` (see runs()). `said` are the
    words of the rows' messages."""
    verdicts, known = [], {word for run in secret for word in run.split()}
    for row, found in zip(rows, said, strict=True):
        user, answer = text_of(row), row.answer
        phrase, streak = _speaks(user) or _answer_speaks(answer), 0
        for n, word in enumerate([*found, *words(answer)] if secret and not phrase else ()):
            streak = streak + 1 if word in known else 0
            if streak >= 7 and (run := " ".join([*found, *words(answer)][n - 6 : n + 1])) in secret:
                phrase = run
                break
        where = "answer" if phrase and phrase.lower() in answer.lower() else "message"
        reason = f"the {where} speaks of its own making"
        verdicts.append(phrase and Verdict("leaked_instructions", reason, {"phrase": phrase, "in": where}))
    return verdicts


def runs(found: list[str]) -> list[str]:
    """The runs of seven words."""
    return [" ".join(found[i : i + 7]) for i in range(len(found) - 6)]


def trivial(rows: list[Row], said: list[list[str]], min_words: int) -> Verdicts:
    """Gate 6 on the row alone: too short, the same words again and again, or an unfilled template."""
    verdicts = []
    for row, found in zip(rows, said, strict=True):
        verdict = None
        if len(found) < min_words:
            verdict = Verdict("trivial", f"fewer than {min_words} words", {"words": len(found)})
        elif len(found) >= 10 and len(set(found)) / len(found) < 0.3:
            share = round(len(set(found)) / len(found), 2)
            verdict = Verdict("trivial", "the same few words again and again", {"distinct_share": share})
        elif row.meta.kind not in ("adversarial", "schema_repair") and (hit := _PLACEHOLDER.search(text_of(row))):
            verdict = Verdict("trivial", "an unfilled template", {"phrase": hit.group(0)})
        verdicts.append(verdict)
    return verdicts


def too_long(tokens: int, limit: int) -> Verdict | None:
    """Gate 8: at most `limit` of the student's tokens for the whole row."""
    evidence = {"tokens": tokens, "limit": limit}
    return Verdict("length", f"{tokens} tokens; at most {limit} fit", evidence) if tokens > limit else None


def checked(rows: list[Row], values: list[dict], checks: list[Callable]) -> Verdicts:
    """The user's own checks: `check(row, value)` gives a reason to refuse, or None. A crash raises SlmError."""
    verdicts = []
    for row, value in zip(rows, values, strict=True):
        verdict = None
        for check in checks:
            try:
                reason = check(row, value)
            except Exception as error:
                problem = f"{check.__name__} crashed on row {row.id} ({type(error).__name__}: {error})"
                raise SlmError(f"task/checks.py: {problem}; mend it in 04.") from error
            if reason:
                verdict = Verdict("check", reason, {"check": check.__name__})
                break
        verdicts.append(verdict)
    return verdicts


def _speaks(text: str) -> str | None:
    low = text.lower()
    hit = _LEAK_ANY.search(text) if not text.isascii() or any(hint in low for hint in _LEAK_HINTS) else None
    return hit and hit.group(0)


@lru_cache(100_000)
def _answer_speaks(answer: str) -> str | None:
    hit = _LEAK_ANSWER.search(answer)
    return _speaks(answer) or (hit and hit.group(0))
