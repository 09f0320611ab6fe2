"""Personal data and secrets out of logs: each find becomes a placeholder, and nothing of it is kept.

By pattern and check sum always; names, by presidio, where that is installed. Postal addresses are not found."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from importlib import import_module

from slm.curate import privacy
from slm.errors import SlmError
from slm.production.logs import LogLine
from slm.rows import digest

Guess = Callable[[str], list[tuple[int, int, str]]]

_NAMES = {
    "a secret key": "SECRET", "a payment card number": "CARD", "a bank account number": "IBAN", 
    "a US social security number": "SSN", "an international phone number": "PHONE",
}  # fmt: skip
COMMON = {  # the commonest small words, by which languages are told apart
    code: frozenset(said.split()) for code, said in {
        "en": "the and is to of in it you that for on my was with not are this have can do your please i we be how what",
        "de": "der die das und ist nicht ich sie wir mit ein eine für auf zu den von bitte mein wie kann habe es im wo",
        "fr": "le la les et est de des je vous nous pas une un pour dans que qui mon ma avec sur ne au du ce il j",
        "es": "el la los las y es de que no en un una por para con mi se lo como del al está su qué tengo puedo",
        "it": "il la le di e è che non un una per con mi sono del della in si ho come lo alla questo mio gli",
        "nl": "de het een en is van ik niet dat op te in voor met mijn je zijn er aan kan maar naar ook hoe heb",
        "pt": "o a os as e é de que não em um uma por para com meu minha se do da no na como está eu você",
        "pl": "i w na nie się z do to jest że jak mi mój moja czy po dla od proszę mam ale przez co za o",
    }.items()
}  # fmt: skip
PLACEHOLDER = re.compile(r"\[[A-Z]+_\d+\]")
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
_IP = re.compile(
    r"(?<![\w.])(?<!ersion )(?<!ersión )(?<!ersione )(?<!elease )(?<!irmware )"
    r"(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?![\w.]*\d)"
)
_PHONE = re.compile(r"(?<![\w.+/-])(?:(?:\+|00|\(?0)\(?\d[\d ()/.-]{5,18}\d|\(?\d{3}\)?[ .-]\d{3}[ .-]\d{4})(?![\w-])")
_DATE = re.compile(r"^\d{1,4}([./-])\d{1,2}\1\d{1,4}\b")
_RANDOM = re.compile(r"(?<![\w/+-])[A-Za-z0-9_+/-]{24,}={0,2}(?![\w/+-])")


def scrub(*texts: str, guess: Guess | None = None) -> tuple[list[str], Counter]:
    """The texts with placeholders such as [EMAIL_1], and how many different values of each type were found. Equal
    values get equal placeholders in all the texts of one call (input, output and correction of a request) and never
    across calls, so that people cannot be followed through a log. `guess` looks at the first text alone: the others are
    the contract's words, in which a language model sees names."""
    seen: dict[str, str] = {}
    counts: Counter = Counter()
    found = []
    for n, text in enumerate(texts):
        parts, at = [], 0
        for start, end, kind in spans(text, None if n else guess):
            if (value := text[start:end]) not in seen:
                counts[kind] += 1
                seen[value] = f"[{kind}_{counts[kind]}]"
            parts += [text[at:start], seen[value]]
            at = end
        found.append("".join(parts) + text[at:])
    if known := sorted((value for value in seen if len(value) > 3), key=len, reverse=True):
        again = re.compile(rf"(?<![\w-])(?:{'|'.join(map(re.escape, known))})(?![\w-])")
        found = [again.sub(lambda hit: seen[hit[0]], text) for text in found]
    return found, counts


def scrub_logs(lines: Sequence[LogLine], settings=None) -> tuple[list[LogLine], Counter]:
    """The lines without personal data and secrets, and the counts by type. With `settings`, names too, where
    `production.scrub` lets a language model look. Raises SlmError, and nothing goes on, when the scrub cannot run or a
    second look by pattern still finds something."""
    clean, total, guess = [], Counter(), settings and guesser(settings)
    for number, line in enumerate(lines, 1):
        try:
            texts = [line.input, line.output, *([line.correction] if line.correction is not None else [])]
            texts, counts = scrub(*texts, guess=guess)
            if scrub(*texts)[1]:
                raise ValueError("a second look still finds something")
            hidden = digest(line.request_id) if scrub(line.request_id)[1] else line.request_id
        except Exception as error:  # its text may quote the request
            problem = f"the scrub failed on usable line {number} ({type(error).__name__}); nothing of this log goes on"
            raise SlmError(f"{problem}. Take that request out, or set production.scrub to patterns.") from None
        total += counts
        said = dict(zip(("input", "output", "correction"), texts, strict=False))
        clean.append(line.model_copy(update={**said, "request_id": hidden}))
    return clean, total


def spans(text: str, guess: Guess | None = None) -> list[tuple[int, int, str]]:
    """(start, end, type) of what must go, in order and apart from each other; what proves itself comes first."""
    found = [(*hit.span(), "") for hit in PLACEHOLDER.finditer(text)]
    first = (("SECRET", _BLOCK, 0), ("URL", _URL, 0), ("SECRET", _PASSWORD, 1), ("EMAIL", _EMAIL, 0))
    for kind, pattern, group in first:
        found += [(*hit.span(group), kind) for hit in pattern.finditer(text)]
    found += [(start, end, _NAMES.get(name, "EMAIL")) for name, start, end in privacy.hits(text)]
    found += [(*hit.span(), "IP") for hit in _IP.finditer(text)]
    found += [(*hit.span(), "PHONE") for hit in _PHONE.finditer(text) if _phone(hit[0])]
    found += [(*hit.span(), "SECRET") for hit in _RANDOM.finditer(text) if _random(hit[0])]
    kept: list[tuple[int, int, str]] = []
    for start, end, kind in [*found, *(guess(text) if guess else ())]:
        if all(end <= a or start >= b for a, b, _ in kept):
            kept.append((start, end, kind))
    return sorted(span for span in kept if span[2])


def guesser(settings) -> Guess | None:
    """presidio and detect-secrets as `production.scrub` says. "auto" does without them where they are not installed,
    and says so; "presidio" raises SlmError."""
    own, models = settings.production.scrub, settings.curate.spacy_models
    if own == "patterns":
        return None
    try:
        look = privacy.analyzer(models)
    except SlmError as error:
        if own == "presidio":
            raise
        print(f"Scrub by pattern and check sum alone, names stay in the text: {error}")
        return None
    codes = dict.fromkeys([*models, *COMMON])
    words = {code: import_module(f"spacy.lang.{code}.stop_words").STOP_WORDS for code in codes}

    def guess(text: str) -> list[tuple[int, int, str]]:
        code = language(text, words) or next(iter(words))
        names = [(start, end) for kind, start, end in (look(text, code) if code in models else ()) if kind == "person"]
        found = [(start, end, "PERSON") for start, end in names if not re.search(r"\d", text[start:end])]
        for _, value in privacy.secrets(text):
            found += [(*hit.span(), "SECRET") for hit in re.finditer(re.escape(value), text)]
        return found

    return guess


def language(text: str, words: Mapping[str, Set[str]] = COMMON) -> str:
    """The code of the language that most of a text's words are common in; "" when none is."""
    said = set(re.findall(r"\w+", text.lower()))
    code = max(words, key=lambda one: len(said & words[one]))
    return code if said & words[code] else ""


def _phone(text: str) -> bool:
    return 8 <= sum(c.isdigit() for c in text) <= 15 and not _DATE.match(text)


def _random(text: str) -> bool:
    mixed = any(c.isdigit() for c in text) and any(c.islower() for c in text) and any(c.isupper() for c in text)
    return mixed and privacy.entropy(text) >= 4.0
