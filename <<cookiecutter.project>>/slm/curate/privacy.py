"""Personal data and secrets, by patterns that prove themselves: check sums, issuers' prefixes, randomness."""

import math
import re
from collections import Counter

from slm.curate.read import Verdict
from slm.errors import SlmError
from slm.rows import Row

_CARD = re.compile(r"(?<![\w-])\d(?:[ -]?\d){12,18}(?![\w-])")
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
    ("a payment card number", _CARD, lambda card: len(set(_digits(card))) > 1 and luhn(_digits(card))),
    ("a bank account number", _IBAN, lambda iban: iban_valid(iban.replace(" ", ""))),
    ("an international phone number", _PHONE, lambda phone: not _FICTION.search(_digits(phone))),
    ("an e-mail address outside the reserved domains (example.com)", _EMAIL,
     lambda email: not _RESERVED.search(email.rsplit("@", 1)[1].lower())),
)  # fmt: skip


def find(text: str) -> tuple[str, str] | None:
    """(what, the matching text) of the first piece of personal data or secret, or None."""
    hits = ((name, hit[hit.lastindex or 0], test) for name, pattern, test in KINDS for hit in pattern.finditer(text))
    return next(((name, found) for name, found, test in hits if test(found)), None)


def personal(rows: list[Row]) -> list[Verdict | None]:
    """Refuse rows with personal data or secrets; the evidence shows only the beginning of what was found."""
    hits = [find("\n".join(m.content for m in row.messages)) for row in rows]
    return [hit and Verdict("personal_data", f"holds {hit[0]}", {"phrase": f"{hit[1][:4]}…"}) for hit in hits]


def guessed(rows: list[Row], models: dict[str, str]) -> list[Verdict | None]:
    """detect-secrets on every row; presidio (names, phone, US social security and IP numbers) on those of customers and
    people, for a teacher's persons are invented, and only in the languages of `models` (language -> spaCy model): other
    names go unseen. It guesses, so a person may overrule it. Raises SlmError where a package or model is missing."""
    try:
        import presidio_analyzer as presidio
        import spacy
        from detect_secrets.core.scan import scan_line
        from detect_secrets.settings import default_settings
        from presidio_analyzer import nlp_engine, predefined_recognizers as known
    except ImportError as error:
        raise SlmError(f"curate.privacy presidio: {error.name} is missing; pip install -e '.[privacy]'.") from None
    if absent := [name for name in models.values() if not spacy.util.is_package(name)]:
        raise SlmError(f"curate.spacy_models: {absent[0]} is not installed; install it or name another.")
    named = [{"lang_code": code, "model_name": name} for code, name in models.items()]
    nlp = nlp_engine.NlpEngineProvider(nlp_configuration={"nlp_engine_name": "spacy", "models": named}).create_engine()
    chosen = [kind(supported_language=code) for code in models for kind in (known.PhoneRecognizer, known.IpRecognizer, known.UsSsnRecognizer)]
    chosen += [known.SpacyRecognizer(supported_language=code, supported_entities=["PERSON"]) for code in models]
    registry = presidio.RecognizerRegistry(chosen, supported_languages=[*models])
    engine, verdicts = presidio.AnalyzerEngine(registry, nlp, supported_languages=[*models]), []
    for row in rows:
        text, found = "\n".join(m.content for m in row.messages), []
        if row.meta.source in ("human", "production") and row.meta.language in models:
            hits = engine.analyze(text, row.meta.language, score_threshold=0.4)
            found = [(hit.entity_type.lower(), text[hit.start : hit.end]) for hit in hits]
        with default_settings():  # its entropy detectors take any word for a secret
            secrets = [s for line in text.splitlines() for s in scan_line(line) if "Entropy" not in s.type]
        found += [(secret.type.lower(), secret.secret_value) for secret in secrets]
        proof = {"kind": found[0][0], "phrase": f"{found[0][1][:4]}…"} if found else {}
        verdicts.append(Verdict("personal_data_model", f"seems to hold {found[0][0]}", proof) if found else None)
    return verdicts
