"""Rows of data: one JSONL line each, read with errors that name the file and the line, written atomically."""

import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from slm.errors import SlmError

Kind = Literal[
    "canonical", "boundary", "negative", "adversarial", "near_miss", "production_like", "style", "schema_repair"
]
Difficulty = Literal["easy", "medium", "hard"]
Source = Literal["human", "teacher", "production", "program"]
KINDS: tuple[str, ...] = get_args(Kind)
DIFFICULTIES: tuple[str, ...] = get_args(Difficulty)


class Record(BaseModel):
    """What is read from disk: an unknown field is an error."""

    model_config = ConfigDict(extra="forbid")


class Message(Record, frozen=True):
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str


class Meta(Record, frozen=True):
    """What is known about a row; `group` keeps rows of one scenario, document or customer on one side of a split."""

    category: str
    kind: Kind = "canonical"
    difficulty: Difficulty = "medium"
    language: str = "en"
    source: Source = "human"
    group: str = ""
    provenance: dict = Field(default_factory=dict)


class Row(Record, frozen=True):
    """One example. `messages` ends with the assistant's answer; `rejected` holds the worse answer of a preference pair."""

    id: str
    messages: list[Message] = Field(min_length=2)
    meta: Meta
    rejected: str | None = None

    @model_validator(mode="after")
    def _ends_with_answer(self):
        if self.messages[-1].role != "assistant":
            raise ValueError("the last message must be the assistant's")
        if not any(m.role == "user" for m in self.messages):
            raise ValueError("there is no user message")
        return self

    @property
    def answer(self) -> str:
        """The final assistant content."""
        return self.messages[-1].content

    @property
    def user(self) -> str:
        """The last user message."""
        return next(m.content for m in reversed(self.messages) if m.role == "user")

    def answered(self, answer: str) -> "Row":
        """The row with another final answer."""
        last = self.messages[-1].model_copy(update={"content": answer})
        return self.model_copy(update={"messages": [*self.messages[:-1], last]})

    def noted(self, **meta) -> "Row":
        """The row with other fields of `meta`; a provenance adds to what is known."""
        if "provenance" in meta:
            meta["provenance"] = {**self.meta.provenance, **meta["provenance"]}
        return self.model_copy(update={"meta": self.meta.model_copy(update=meta)})


def digest(text: str, size: int = 12) -> str:
    """The first `size` hex digits of a text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:size]


def plain(text: str) -> str:
    """A text in lower case, each run of white space one space: what counts as the same text."""
    return " ".join(text.lower().split())


def content_id(messages: Iterable[Message]) -> str:
    """A 12-digit hex id from the roles and contents, so that equal rows have equal ids."""
    return digest(json.dumps([[m.role, m.content] for m in messages], ensure_ascii=False))


def make_row(user: str, answer: str, *, id: str | None = None, rejected: str | None = None, **meta) -> Row:
    """A row from one question and its answer; `meta` are the fields of `Meta`. The id is the content hash by default."""
    messages = [Message(role="user", content=user), Message(role="assistant", content=answer)]
    return Row(id=id or content_id(messages), messages=messages, meta=Meta(**meta), rejected=rejected)


def from_any(record: dict, **meta) -> Row:
    """A row from one of the four formats: instruction, chat, tool call (a chat), preference pair.

    `meta` fills the fields the record does not carry. Raises ValueError when the record is none of the four.
    """
    if not isinstance(record, dict):
        raise ValueError("a line must be a JSON object")
    if "messages" in record and "meta" in record:
        return Row.model_validate(record)
    known = {"messages", "instruction", "input", "output", "prompt", "chosen", "rejected"}
    if unknown := sorted(record.keys() - known):
        raise ValueError(f"unknown field {unknown[0]!r}; a row has id, messages and meta")
    if "messages" in record:
        messages = [Message.model_validate(m) for m in record["messages"]]
        return Row(id=content_id(messages), messages=messages, meta=Meta(**meta))
    if "instruction" in record and "output" in record:
        user = "\n\n".join(t for t in (record["instruction"], record.get("input", "")) if t)
        return make_row(user, record["output"], **meta)
    if {"prompt", "chosen", "rejected"} <= record.keys():
        return make_row(record["prompt"], record["chosen"], rejected=record["rejected"], **meta)
    raise ValueError("none of the four formats: messages, instruction/output, prompt/chosen/rejected")


def explain(error: Exception) -> str:
    """A validation error as one short phrase that names the field."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        return f"{where}: {message}" if where else message
    return str(error)


def iter_lines(path: Path, blank: bool = False) -> Iterator[tuple[int, str]]:
    """Line numbers (from 1) and lines of a UTF-8 file, those without text only when `blank`. Raises SlmError on a
    missing file or bad bytes."""
    path = Path(path)
    if not path.is_file():
        raise SlmError(f"{path}: there is no such file.")
    with path.open("rb") as handle:
        for number, raw in enumerate(handle, 1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise SlmError(f"{path}:{number}: not UTF-8 ({error.reason}); save the file as UTF-8.") from None
            if blank or line.strip():
                yield number, line


def iter_rows(path: Path, **meta) -> Iterator[Row]:
    """The rows of a JSONL file, in any of the four formats. Raises SlmError with file:line at the first bad line."""
    for number, line in iter_lines(path):
        try:
            row = from_any(json.loads(line), **meta)
        except (ValueError, ValidationError, TypeError, RecursionError) as error:
            raise SlmError(f"{path}:{number}: {explain(error)}. Mend or remove that line.") from None
        yield row


def read_rows(path: Path, **meta) -> list[Row]:
    """All rows of a JSONL file. Raises SlmError on a bad line or on two rows with one id."""
    rows, seen = [], {}
    for row in iter_rows(path, **meta):
        if row.id in seen:
            raise SlmError(f"{path}: rows {seen[row.id]} and {len(rows) + 1} share the id {row.id}; ids must be unique.")
        seen[row.id] = len(rows) + 1
        rows.append(row)
    return rows


@contextmanager
def replacing(path: Path):
    """A binary stream whose content takes the place of `path` at the end, whole or not at all."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, path)
    except OSError as error:
        where = path if error.filename in (None, str(part)) else error.filename
        problem = f"{error.strerror}; nothing was written. Mend that (free some space?), run again"
        raise SlmError(f"{where}: {problem}.") from None
    finally:
        with suppress(OSError):
            part.unlink()


def write_text(path: Path, text: str | Iterable[str]) -> Path:
    """Write a whole file or nothing, from one text or from parts as they come."""
    with replacing(path) as stream:
        stream.writelines(part.encode() for part in ([text] if isinstance(text, str) else text))
    return Path(path)


def write_json(path: Path, value) -> Path:
    """Write a JSON file atomically, indented, keys in the given order."""
    return write_text(path, json.dumps(value, ensure_ascii=False, indent=2, default=str) + "\n")


def write_jsonl(path: Path, records: Iterable[dict]) -> Path:
    """Write dictionaries as JSONL, atomically."""
    return write_text(path, (json.dumps(r, ensure_ascii=False) + "\n" for r in records))


def write_rows(path: Path, rows: Iterable[Row]) -> Path:
    """Write rows as JSONL, atomically."""
    return write_jsonl(path, (row.model_dump(exclude_none=True) for row in rows))


def append_jsonl(path: Path, records: Iterable[dict]) -> None:
    """Add lines to a file, on disk when this returns. Half of a surrogate pair (an emoji cut in two) is escaped."""
    text = "".join(json.dumps(record, ensure_ascii=False, default=str) + "\n" for record in records)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as stream:
            stream.write(text.encode("utf-8", "backslashreplace"))
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        problem = f"cannot write ({error.strerror}). Free some space and run again; nothing is lost"
        raise SlmError(f"{path}: {problem}.") from None
