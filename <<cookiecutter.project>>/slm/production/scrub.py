"""Personal data and secrets out of logs: each find becomes a placeholder, and nothing of it is kept.

Found by pattern and check sum. Names and postal addresses are not: a person still has to read what goes on."""

import re
from collections import Counter
from collections.abc import Sequence

from slm.curate.privacy import entropy, find
from slm.production.logs import LogLine

_NAMES = {
    "a secret key": "SECRET", "a payment card number": "CARD", "a bank account number": "IBAN",
    "an international phone number": "PHONE",
}  # fmt: skip
_BLOCK = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.S)
_URL = re.compile(
    r"\b[a-z][a-z0-9+.-]{1,15}://(?:[^\s/@\"']+@[^\s\"'<>]+|[^\s\"'<>]*[?&#](?:token|key|sig|auth|password|code|secret)=[^\s\"'<>]*"
    r"|(?:localhost|[\w.-]+\.(?:local|internal|intranet|corp|lan)|10(?:\.\d+){3}|192\.168(?:\.\d+){2})\b[^\s\"'<>]*)", re.I,
)  # fmt: skip
_PASSWORD = re.compile(
    r"(?i)\b(?:password|passwort|kennwort|passcode|pwd|mot de passe|contraseña|clave|pin|token|secret)\b[^.:=\n]{0,20}?"
    r"\s*(?:\bis|\bwas|\bist|\bwar|\blautet|\best|\bétait|\bes|\bera|:|=)\s*[\"'“]?(?!\[[A-Z]+_\d)([^\s\"'”,;]*\d[^\s\"'”,;]*)"
)
_EMAIL = re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+")
_IP = re.compile(r"(?<![\w.])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?![\w.]*\d)")
_PHONE = re.compile(r"(?<![\w.+/-])(?:(?:\+|00|\(?0)\(?\d[\d ()/.-]{5,18}\d|\(?\d{3}\)?[ .-]\d{3}[ .-]\d{4})(?![\w-])")
_DATE = re.compile(r"^\d{1,4}([./-])\d{1,2}\1\d{1,4}\b")
_RANDOM = re.compile(r"(?<![\w/+-])[A-Za-z0-9_+/-]{24,}={0,2}(?![\w/+-])")


def scrub(*texts: str) -> tuple[list[str], Counter]:
    """The texts with placeholders such as [EMAIL_1], and how many different values of each type were found. Equal
    values get equal placeholders in all the texts of one call (input, output and correction of a request) and never
    across calls, so that people cannot be followed through a log."""
    seen: dict[str, str] = {}
    counts: Counter = Counter()

    def hide(kind: str, value: str) -> str:
        if value not in seen:
            counts[kind] += 1
            seen[value] = f"[{kind}_{counts[kind]}]"
        return seen[value]

    return [_scrub(text, hide) for text in texts], counts


def scrub_logs(lines: Sequence[LogLine]) -> tuple[list[LogLine], Counter]:
    """The lines without personal data and secrets, and the counts by type."""
    clean, total = [], Counter()
    for line in lines:
        texts, counts = scrub(line.input, line.output, *([line.correction] if line.correction is not None else []))
        total += counts
        clean.append(line.model_copy(update=dict(zip(("input", "output", "correction"), texts, strict=False))))
    return clean, total


def _scrub(text: str, hide) -> str:
    text = _BLOCK.sub(lambda m: hide("SECRET", m.group(0)), text)
    text = _URL.sub(lambda m: hide("URL", m.group(0)), text)
    text = _PASSWORD.sub(lambda m: m.group(0).replace(m.group(1), hide("SECRET", m.group(1))), text)
    text = _EMAIL.sub(lambda m: hide("EMAIL", m.group(0)), text)
    while hit := find(text):  # the gates of 04: keys by prefix, cards by Luhn, IBANs by mod 97, phones by +
        text = text.replace(hit[1], hide(_NAMES[hit[0]], hit[1]))
    text = _IP.sub(lambda m: hide("IP", m.group(0)), text)
    text = _PHONE.sub(lambda m: hide("PHONE", m.group(0)) if _phone(m.group(0)) else m.group(0), text)
    return _RANDOM.sub(lambda m: hide("SECRET", m.group(0)) if _random(m.group(0)) else m.group(0), text)


def _phone(text: str) -> bool:
    return 8 <= sum(c.isdigit() for c in text) <= 15 and not _DATE.match(text)


def _random(text: str) -> bool:
    mixed = any(c.isdigit() for c in text) and any(c.islower() for c in text) and any(c.isupper() for c in text)
    return mixed and entropy(text) >= 4.0
