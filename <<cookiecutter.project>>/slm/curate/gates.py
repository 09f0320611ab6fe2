"""The gates that judge a row by itself: pure functions, a row -> its verdict, or None."""

import re
from collections.abc import Callable
from functools import lru_cache

from slm.curate.read import Verdict
from slm.curate.text import text_of, words
from slm.errors import SlmError
from slm.rows import Row

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


def restricted(row: Row, rules: list[str]) -> Verdict | None:
    """The first of `rules` (a value, or key=value) that the row's source or provenance carries."""
    known = {"source": row.meta.source, "consent": row.meta.source != "production", **row.meta.provenance}
    known["consent"] = str(known["consent"]).lower() in ("true", "yes", "1")
    carried = {text.lower() for key, value in known.items() for text in (f"{key}={value}", str(value))}
    hit = next((rule for rule in rules if rule.lower() in carried), None)
    return Verdict("restricted_source", f"its provenance says {hit}", {"rule": hit}) if hit else None


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


def leaked(row: Row, said: list[str], secret: frozenset[str] = frozenset()) -> Verdict | None:
    """Gate 4: no trace of the making, nor a run of seven words that stands in `secret` (see runs()). `said` are the
    words of the row's messages."""
    answer = row.answer
    phrase = _speaks(text_of(row)) or _answer_speaks(answer)
    if secret and not phrase:
        found, known = [*said, *words(answer)], _words_in(secret)
        near = (found[i : i + 7] for i in range(len(found) - 6) if found[i] in known and found[i + 6] in known)
        phrase = next((run for part in near if (run := " ".join(part)) in secret), None)
    if not phrase:
        return None
    where = "answer" if phrase.lower() in answer.lower() else "message"
    return Verdict("leaked_instructions", f"the {where} speaks of its own making", {"phrase": phrase, "in": where})


def runs(found: list[str]) -> list[str]:
    """The runs of seven words."""
    return [" ".join(found[i : i + 7]) for i in range(len(found) - 6)]


def trivial(row: Row, found: list[str], min_words: int) -> Verdict | None:
    """Gate 6 on the row alone: too short, the same words again and again, or an unfilled template."""
    share = len(set(found)) / max(1, len(found))
    if len(found) < min_words:
        return Verdict("trivial", f"fewer than {min_words} words", {"words": len(found)})
    if len(found) >= 10 and share < 0.3:
        return Verdict("trivial", "the same few words again and again", {"distinct_share": round(share, 2)})
    if row.meta.kind not in ("adversarial", "schema_repair") and (hit := _PLACEHOLDER.search(text_of(row))):
        return Verdict("trivial", "an unfilled template", {"phrase": hit.group(0)})
    return None


def too_long(tokens: int, limit: int) -> Verdict | None:
    """Gate 8: at most `limit` of the student's tokens for the whole row."""
    evidence = {"tokens": tokens, "limit": limit}
    return Verdict("length", f"{tokens} tokens; at most {limit} fit", evidence) if tokens > limit else None


def checked(row: Row, value: dict, checks: list[Callable]) -> Verdict | None:
    """The user's own checks: `check(row, value)` gives a reason to refuse, or None. A crash raises SlmError."""
    for check in checks:
        try:
            reason = check(row, value)
        except Exception as error:
            problem = f"{check.__name__} crashed on row {row.id} ({type(error).__name__}: {error})"
            raise SlmError(f"task/checks.py: {problem}; mend it in 04.") from error
        if reason:
            return Verdict("check", reason, {"check": check.__name__})
    return None


@lru_cache(1)
def _words_in(secret: frozenset[str]) -> frozenset[str]:
    return frozenset(word for run in secret for word in run.split())


def _speaks(text: str) -> str | None:
    low = text.lower()
    hit = _LEAK_ANY.search(text) if not text.isascii() or any(hint in low for hint in _LEAK_HINTS) else None
    return hit and hit.group(0)


@lru_cache(100_000)
def _answer_speaks(answer: str) -> str | None:
    hit = _LEAK_ANSWER.search(answer)
    return _speaks(answer) or (hit and hit.group(0))
