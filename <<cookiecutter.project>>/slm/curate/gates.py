"""The gates that judge a row by itself: pure functions, rows -> one verdict (or None) per row."""

import re
from collections.abc import Callable

from slm.curate.read import Verdict
from slm.curate.text import skeleton, text_of, words
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
    r"|per the (rubric|instructions|prompt|schema)|(scoring|grading|quality) rubric"
    r"|(a|an|writing) (realistic|diverse|production-like) (request|message|example|input|row)|output contract)",
    re.IGNORECASE,
)  # fmt: skip
_LEAK_ANSWER = re.compile(
    r"\b(system prompt|the prompt|my instructions|hidden rules?|rubric|teacher|as (requested|instructed)|jsonl)\b", re.IGNORECASE
)
_PLACEHOLDER = re.compile(
    r"\{\{?\s*\w+\s*\}?\}|\[(your |customer |company |product )?(name|company|date|number|email|order id|product)\]"
    r"|<(name|company|date|number|email|order_id|product)>|lorem ipsum",
    re.IGNORECASE,
)


def read_answers(rows: list[Row], contract) -> tuple[Verdicts, list[dict | None]]:
    """Gates 1 to 3 on the answers, and the values read from them. json_validity: the answer holds no JSON.
    schema_validity: a field is missing, unknown or has a value that is not allowed. contract_validity: the JSON is
    right, but the answer is not exactly that (prose or a code fence around it)."""
    verdicts, values = [], []
    for row in rows:
        strict, verdict = contract.parse(row.answer), None
        if strict.stage == "schema":
            field = strict.error.split(":")[0]
            verdict = Verdict("schema_validity", f"the answer breaks the contract: {strict.error}", {"field": field})
        elif strict.error and contract.parse(row.answer, lenient=True).error is None:
            verdict = Verdict("contract_validity", "text around the JSON of the answer", {"answer": row.answer[:300]})
        elif strict.error:
            verdict = Verdict("json_validity", f"the answer is {strict.error}", {"answer": row.answer[:300]})
        verdicts.append(verdict)
        values.append(None if verdict else strict.value)
    return verdicts, values


def leaked(rows: list[Row], hidden: list[str] = ()) -> Verdicts:
    """Gate 4: no trace of the making. Of `hidden` texts (prompts) no 7 words in a row may appear."""
    secret = {run for text in hidden for run in _runs(text)}
    verdicts = []
    for row in rows:
        user, answer = text_of(row), row.answer
        hit = _LEAK_ANY.search(user) or _LEAK_ANY.search(answer) or _LEAK_ANSWER.search(answer)
        phrase = hit.group(0) if hit else next((run for run in _runs(f"{user}\n{answer}") if run in secret), None)
        where = "answer" if phrase and phrase.lower() in answer.lower() else "message"
        reason = f"the {where} speaks of its own making"
        verdicts.append(phrase and Verdict("leaked_instructions", reason, {"phrase": phrase, "in": where}))
    return verdicts


def trivial(rows: list[Row], min_words: int, names: frozenset[str] = frozenset()) -> Verdicts:
    """Gate 6: neither too short, nor repetitive, nor a template (unfilled, or filled again with other numbers and
    names). `names` are words that a template would swap (label values, product names)."""
    verdicts, seen = [], {}
    for row in rows:
        text = text_of(row)
        found, verdict = words(text), None
        if len(found) < min_words:
            verdict = Verdict("trivial", f"fewer than {min_words} words", {"words": len(found)})
        elif len(found) >= 10 and len(set(found)) / len(found) < 0.3:
            share = round(len(set(found)) / len(found), 2)
            verdict = Verdict("trivial", "the same few words again and again", {"distinct_share": share})
        elif row.meta.kind not in ("adversarial", "schema_repair") and (hit := _PLACEHOLDER.search(text)):
            verdict = Verdict("trivial", "an unfilled template", {"phrase": hit.group(0)})
        elif len(found) >= 6:
            shape = skeleton(text, names)
            twin = seen.setdefault(shape, row)
            if twin is not row and words(text_of(twin)) != found:
                evidence = {"twin": twin.id, "skeleton": shape}
                verdict = Verdict("trivial", "the same sentence with other numbers or names", evidence)
        verdicts.append(verdict)
    return verdicts


def too_long(rows: list[Row], contract, count_tokens: Callable, limit: int) -> Verdicts:
    """Gate 8: at most `limit` of the student's tokens, as `count_tokens(list of message lists)` counts whole rows."""
    counts = count_tokens([contract.messages(row) for row in rows]) if rows else []
    return [
        Verdict("length", f"{n} tokens; at most {limit} fit", {"tokens": n, "limit": limit}) if n > limit else None
        for n in counts
    ]


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


def _runs(text: str) -> list[str]:
    found = words(text)
    return [" ".join(found[i : i + 7]) for i in range(len(found) - 6)]
