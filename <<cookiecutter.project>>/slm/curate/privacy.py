"""Personal data and secrets, by patterns that prove themselves: check sums, issuers' prefixes, randomness."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator

from slm.curate.read import Verdict
from slm.errors import SlmError
from slm.rows import Row

_SSN = re.compile(
    r"(?<![\w.-])(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-])"
    r"|(?i:\b(?:ssn|social security)\b[^\d\n]{0,20})((?!000|666|9)\d{3}[ -]?(?!00)\d{2}[ -]?(?!0000)\d{4})(?!\d)"
)
_CARD = re.compile(r"(?<![\w-])\d(?:[ -]?\d){12,18}(?![\w-])")
_ISSUER = re.compile(r"(?!(.)\1+$)(?:4|5[0-8]|2[2-7]|3[04-9]|6)")  # first digits of payment networks (ISO/IEC 7812)
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")
_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]+@[\w-]+(?:\.[\w-]+)+")
_RESERVED = re.compile(r"(^|\.)(example\.(com|org|net)|example|test|invalid|localhost)$")
_KEYS = re.compile(
    r"\b(?:sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|AKIA[0-9A-Z]{16}|AIza[\w-]{30,}"
    r"|xox[abprs]-[\w-]{10,}|hf_[A-Za-z0-9]{20,}|glpat-[\w-]{16,}|[rs]k_live_\w{10,}"
    r"|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,})|-----BEGIN [A-Z ]*PRIVATE KEY-----|://[^\s/:@]+:[^\s/@]+@"
)
_NAMED = re.compile(r"(?i)\b(?:password|passwort|token|secret|api[ _-]?key|key)\b\W{1,5}(?:is\W+)?(?!https?:)([^\s\"'<>]{12,})")
_PHONE = re.compile(r"(?<![\w+])\+\d(?:[ ().-]{0,2}\d){8,14}(?!\d)")
_FICTION = re.compile(r"555|^441632960")  # kept free for stories (NANPA 555-01xx, Ofcom 01632 960xxx)


def luhn(digits: str) -> bool:
    """The check sum of payment cards (ISO/IEC 7812-1)."""
    doubled = (int(digit) * (1 + place % 2) for place, digit in enumerate(reversed(digits)))
    return sum(n - 9 if n > 9 else n for n in doubled) % 10 == 0


def iban_valid(text: str) -> bool:
    """The check sum of bank account numbers (ISO 13616: mod 97 is 1)."""
    return 15 <= len(text) <= 34 and int("".join(str(int(c, 36)) for c in text[4:] + text[:4])) % 97 == 1


def entropy(text: str) -> float:
    """Shannon entropy in bits per character."""
    return -sum(n / len(text) * math.log2(n / len(text)) for n in Counter(text).values()) if text else 0.0


def _digits(text: str) -> str:
    return re.sub(r"\D", "", text)


# What is looked for, in this order; a pattern's hit (its first group, where it has one) counts when the test holds.
KINDS = (
    ("a secret key", _KEYS, lambda key: True),
    ("a secret key", _NAMED, lambda key: entropy(key) >= 3.5 and any(c.isdigit() for c in key)),
    ("a payment card number", _CARD, lambda card: bool(_ISSUER.match(_digits(card))) and luhn(_digits(card))),
    ("a bank account number", _IBAN, lambda iban: iban_valid(iban.replace(" ", ""))),
    ("a US social security number", _SSN, lambda ssn: True),
    ("an international phone number", _PHONE, lambda phone: not _FICTION.search(_digits(phone))),
    ("an e-mail address outside the reserved domains (example.com)", _EMAIL,
     lambda email: not _RESERVED.search(email.rsplit("@", 1)[1].lower())),
)  # fmt: skip


def hits(text: str) -> Iterator[tuple[str, int, int]]:
    """(what, start, end) of every piece of personal data or secret, kind by kind."""
    for name, pattern, test in KINDS:
        for hit in pattern.finditer(text):
            if test(hit[hit.lastindex or 0]):
                yield name, *hit.span(hit.lastindex or 0)


def personal(row: Row) -> Verdict | None:
    """Refuse a row with personal data or secrets; the evidence shows only the beginning of what was found."""
    text = "\n".join(m.content for m in row.messages)
    for name, start, end in hits(text):
        return Verdict("personal_data", f"holds {name}", {"phrase": f"{text[start:end][:4]}…"})


def guessed(rows: list[Row], models: dict[str, str]) -> list[Verdict | None]:
    """detect-secrets on every row; presidio (names, phone, US social security and IP numbers) on those of customers and
    people, for a teacher's persons are invented, and only in the languages of `models` (language -> spaCy model): other
    names go unseen. It guesses, so a person may overrule it. Raises SlmError where a package or model is missing."""
    look, verdicts = analyzer(models), []
    for row in rows:
        text = "\n".join(m.content for m in row.messages)
        own = row.meta.source in ("human", "production") and row.meta.language in models
        found = [(kind, text[start:end]) for kind, start, end in (look(text, row.meta.language) if own else ())]
        found += secrets(text)
        proof = {"kind": found[0][0], "phrase": f"{found[0][1][:4]}…"} if found else {}
        verdicts.append(Verdict("personal_data_model", f"seems to hold {found[0][0]}", proof) if found else None)
    return verdicts


def analyzer(models: dict[str, str]) -> Callable[[str, str], list[tuple[str, int, int]]]:
    """A function (text, language) -> [(kind, start, end)]: presidio's recognisers that hold outside the US and UK too.
    Raises SlmError where a package or model is missing."""
    try:
        import detect_secrets  # noqa: F401
        import presidio_analyzer as presidio
        import spacy
        from presidio_analyzer import nlp_engine, predefined_recognizers as known
    except ImportError as error:
        raise SlmError(f"presidio: {error.name} is missing; pip install -e '.[privacy]'.") from None
    if absent := [name for name in models.values() if not spacy.util.is_package(name)]:
        raise SlmError(f"curate.spacy_models: {absent[0]} is not installed; install it or name another.")
    named = [{"lang_code": code, "model_name": name} for code, name in models.items()]
    nlp = nlp_engine.NlpEngineProvider(nlp_configuration={"nlp_engine_name": "spacy", "models": named}).create_engine()
    chosen = [kind(supported_language=code) for code in models for kind in (known.PhoneRecognizer, known.IpRecognizer, known.UsSsnRecognizer)]
    chosen += [known.SpacyRecognizer(supported_language=code, supported_entities=["PERSON"]) for code in models]
    registry = presidio.RecognizerRegistry(chosen, supported_languages=[*models])
    engine = presidio.AnalyzerEngine(registry, nlp, supported_languages=[*models])

    def look(text: str, code: str) -> list[tuple[str, int, int]]:
        return [(h.entity_type.lower(), h.start, h.end) for h in engine.analyze(text, code, score_threshold=0.4)]

    return look


def secrets(text: str) -> list[tuple[str, str]]:
    """(type, value) of what detect-secrets finds, without its entropy detectors, which take any word for a secret."""
    from detect_secrets.core.scan import scan_line
    from detect_secrets.settings import default_settings

    with default_settings():
        found = [secret for line in text.splitlines() for secret in scan_line(line)]
    return [(secret.type.lower(), secret.secret_value) for secret in found if "Entropy" not in secret.type]
