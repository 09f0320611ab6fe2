"""What is about somebody: whether a text, a record or a file holds it, and each kind of file without it."""

import gzip
import json
import os
import re
import sqlite3
import unicodedata
import zlib
from collections.abc import Iterator
from contextlib import closing
from functools import cached_property
from pathlib import Path

from pydantic import BaseModel

from slm.errors import SlmError
from slm.rows import replacing

GONE = "[FORGOTTEN]"
RUN = 5  # so many words in a row quote a message; reports cut messages short
YOURS = ("notebooks/", "task/", "specs/", "project.yaml", "pyproject.toml", "Makefile")  # searched, never written
_FOLDERS = {".git", ".venv", "__pycache__", "locks", "slm", "tests", "scripts", "training"}  # not this project's data
_UNREAD = {".safetensors", ".gguf", ".bin", ".pt", ".pth", ".png", ".parquet", ".arrow", ".zip"}  # weights, and packed
_WORD = re.compile(  # numbers with their decimals; Chinese and Japanese, which have no spaces, sign by sign
    r"&#?\w+;|</?[a-z](?:[^<>\n\\]|\\(?!n)){0,99}>|\\[bfnrt]"
    r"|(\d+(?:\.\d+)+|[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+)"
)
_KEYS = ("id", "row_id", "request_id")


class Content(BaseModel):
    """Ids and groups of rows, the subject as given, the rows' messages and what in these identifies (`forget.telling`), and
    the ids of the repair requests that answered to them."""

    ids: list[str]
    groups: list[str] = []
    subject: str = ""
    texts: list[str] = []
    values: list[str] = []
    requests: list[str] = []

    @cached_property
    def _said(self) -> list[tuple]:
        """The words of each message; of fewer than three anybody may say the same."""
        return [words for words in map(_words, self.texts) if len(words) > 2]

    @cached_property
    def _whole(self) -> list[str]:
        return [_joined(words) for words in (*map(_words, [self.subject, *self.values]), *self._said) if words]

    @cached_property
    def _runs(self) -> set[tuple]:
        return {words[n : n + RUN] for words in self._said for n in range(max(1, len(words) - RUN + 1))}

    def holds(self, text: str, runs: bool = False) -> bool:
        """Whether a text holds the subject, an identifying value or a whole message, or (`runs`) so many words in a
        row of one. Case, line breaks, HTML and JSON escapes make no difference."""
        said, sizes = _words(text), {len(run) for run in self._runs} if runs else ()
        joined = _joined(said)
        return any(whole in joined for whole in self._whole) or any(
            said[n : n + size] in self._runs for size in sizes for n in range(len(said) - size + 1)
        )

    def held(self, text: str) -> set[str]:
        """The values that stand in a text."""
        joined = _joined(_words(text))
        return {value for value in self.values if _joined(_words(value)) in joined}

    @property
    def named(self) -> str:
        """A pattern for any of the ids."""
        return "|".join(map(re.escape, self.ids)) or "(?!)"

    def about(self, record: dict) -> bool:
        """Whether a record is one of the rows, speaks of one as its own, or holds what `holds` looks for."""
        return any(map(self._own, dicts(record))) or self.holds(json.dumps(record, ensure_ascii=False))

    def redact(self, text: str) -> str:
        """The text without the lines that hold or quote anything."""
        return "\n".join(GONE if self.holds(line, runs=True) else line for line in text.split("\n"))

    def pruned(self, body):
        """JSON without the rows' records and quotations; a notebook's cell that names or quotes a row shows nothing."""
        if isinstance(body, list):
            return [self.pruned(one) for one in body if not (isinstance(one, dict) and self._own(one))]
        if not isinstance(body, dict):
            return (GONE if isinstance(body, str) else None) if self._leaf(body) else body
        kept = {key: part for key, part in body.items() if key not in self.ids and not self._leaf(key)}
        new, shown = {key: self.pruned(part) for key, part in kept.items()}, json.dumps(body.get("outputs"))
        told = json.dumps(new.get("outputs")) != shown or re.search(rf"(?<![\w-])(?:{self.named})(?![\w-])", shown)
        if "cell_type" in body and told:
            new["outputs"] = []
        return new

    def written_from(self, record: dict) -> bool:
        """Whether a provenance in it says that one of the rows was shown to the teacher, is the row's twin, or is a
        failure that the row was asked for."""
        made = [*dicts(record)]
        shown = [one for part in made for one in (part.get("contrast_of"), *_list(part.get("parents")))]
        return any(one in self.ids for one in shown) or any(part.get("request") in self.requests for part in made)

    def _leaf(self, value) -> bool:
        if isinstance(value, str):
            return self.holds(value, runs=True)
        return type(value) in (int, float) and str(value) in self.values

    def _own(self, record: dict) -> bool:
        known = record.get("group") in self.groups or any(record.get(key) in self.ids for key in _KEYS)
        return known or "raw" in record and self.holds(str(record["raw"]), runs=True)  # a torn line that 04 refused


def files(settings, left_out: str) -> Iterator[tuple[str, Path]]:
    """Names and paths of the files that are searched, sorted within each folder, but for the one named."""
    for folder, inner, names in os.walk(settings.root):
        inner[:] = sorted(set(inner) - _FOLDERS)
        for path in (Path(folder, name) for name in sorted(names)):
            if path.suffix not in _UNREAD and not path.is_symlink() and path != settings.path(left_out):
                yield path.relative_to(settings.root).as_posix(), path


def content(path: Path) -> str:
    """A file's text, unpacked; of a binary file what reads as text; "" when it is gone. Raises SlmError when it cannot
    be read: nobody could say what it holds."""
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8", "replace")
    except FileNotFoundError:
        return ""
    except (OSError, EOFError, zlib.error) as error:
        problem = getattr(error, "strerror", None) or "broken"
        raise SlmError(f"{path}: cannot be read ({problem}); mend or remove it, then run forget again.") from None


def records(path: Path) -> Iterator[dict]:
    """The objects in the lines of a JSONL file."""
    lines = content(path).split("\n") if _by_line(path) else ()
    return (record for record in map(parsed, lines) if isinstance(record, dict))


def dicts(body) -> Iterator[dict]:
    """A JSON value's objects at any depth."""
    if isinstance(body, dict):
        yield body
    for part in body.values() if isinstance(body, dict) else body if isinstance(body, list) else ():
        yield from dicts(part)


def texts(record: dict, role: str = "user", fields: tuple = ("input",)) -> list[str]:
    """What a person wrote: the user's messages of a row, the input of a log line. Or another role, other fields."""
    said = [m.get("content") for m in _list(record.get("messages")) if isinstance(m, dict) and m.get("role") == role]
    return [text for text in (*said, *map(record.get, fields)) if isinstance(text, str)]


def ids(body) -> set[str]:
    """What rows and log lines in a JSON value are known by."""
    return {part[key] for part in dicts(body) for key in _KEYS if isinstance(part.get(key), str)}


def parsed(text: str):
    """The JSON value of a text; None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def unescaped(text: str) -> str:
    """A text with its \\u escapes, however often escaped themselves, resolved."""
    return re.sub(r"\\+u([0-9a-fA-F]{4})", lambda hit: chr(int(hit[1], 16)), text)


def clean(path: Path, name: str, found: Content) -> bool:
    """Take rows and quotations out of a file, which is `name` in its project; whether it changed. Raises SlmError when
    it cannot be read or written."""
    if name.startswith(YOURS) and not name.startswith("specs/generation_prompts/"):  # 03 writes these
        return False
    if name.startswith(".cache/") and path.suffix == ".sqlite":
        return _entries(path, found)
    if name.startswith(".cache/") and ".sqlite-" in name:
        path.unlink(missing_ok=True)  # the database, which came before it, has taken in what it held
        return False
    packed, text = path.suffix == ".gz", content(path)
    if "\0" in text:  # binary: searched at the end
        return False
    if _by_line(path):  # a record that only quotes stays, without the quotation; a row goes
        quotes = name.startswith("registry/") and not packed and path.stem != "judge"
        new = "".join(_line(line, found, quotes) for line in re.split(r"(?<=\n)", text))
    elif path.suffix in (".json", ".ipynb") and (body := parsed(text)) is not None:
        kept = found.pruned(body)
        indent = 1 if path.suffix == ".ipynb" else 2
        new = text if kept == body else json.dumps(kept, ensure_ascii=False, indent=indent) + "\n"
    else:
        about = rf"(?ms)^### (?:{found.named}) .*?(?=^#|\Z)|<h3>(?:{found.named}) .*?(?=<h[123]|</main>|</body>|\Z)"
        new = found.redact(re.sub(about, "", text))  # a report's section on a row goes whole
    if new != text:
        with replacing(path) as stream:
            stream.write(gzip.compress(new.encode(), 4, mtime=0) if packed else new.encode())
    return new != text


def _entries(path: Path, found: Content) -> bool:
    """Delete a cache's entries that hold or quote anything, and what SQLite keeps of deleted ones: journal and WAL are
    taken in, the file is written anew."""
    try:
        with closing(sqlite3.connect(path, timeout=5)) as store:
            store.execute("PRAGMA journal_mode = DELETE")
            tables = [name for (name,) in store.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            gone = [(table, n) for table in tables for n, *cells in store.execute(f"SELECT rowid, * FROM {table}")
                    if any(found.holds(str(cell), runs=True) for cell in cells)]  # fmt: skip
            for table, n in gone:
                store.execute(f"DELETE FROM {table} WHERE rowid = ?", (n,))
            store.commit()
            store.execute("VACUUM")
    except sqlite3.Error as error:
        raise SlmError(f"{path}: cannot be cleaned ({error}); mend or delete it, then run forget again.") from None
    return bool(gone)


def _line(line: str, found: Content, quotes: bool) -> str:
    record = parsed(line)
    if record is None or not quotes:  # None: torn
        return "" if (found.redact(line) != line if record is None else found.about(record)) else line
    new = found.pruned(record)
    return line if new == record else json.dumps(new, ensure_ascii=False) + "\n"


def _list(value) -> list:
    return value if isinstance(value, list) else []


def _by_line(path: Path) -> bool:
    return ".jsonl" in path.name or path.name.endswith(".unread.txt")


def _words(text: str) -> tuple[str, ...]:
    text = unicodedata.normalize("NFC", unescaped(text))
    return tuple(hit[1].lower() for hit in _WORD.finditer(text) if hit[1])


def _joined(words: tuple[str, ...]) -> str:
    return f" {' '.join(words)} "
