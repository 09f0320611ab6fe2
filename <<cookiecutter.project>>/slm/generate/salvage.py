"""A teacher's answer, line by line: what can be read becomes rows, the rest is kept with its reason."""

import json
import re

from pydantic import ValidationError

from slm.rows import Row, explain, from_any, make_row

_DECODER = json.JSONDecoder(strict=False)  # a real line break inside a text is read as one
_START = re.compile(r'\n[ \t,\[]*\{|\{\s*"(?:input|messages|instruction|prompt)"')  # where the next row may begin


def objects(text: str) -> tuple[list[dict], list[tuple[str, str]]]:
    """The JSON objects of a text (JSONL, an array, fenced, pretty-printed), and what is no object: (reason, text)."""
    found, unread, at = [], [], 0
    while at < len(text):
        start = text.find("{", at)
        prose = text[at : len(text) if start < 0 else start]
        unread += [("prose around the rows", line) for line in prose.splitlines() if _matters(line)]
        if start < 0:
            break
        try:
            value, at = _DECODER.raw_decode(text, start)
            found += value["rows"] if isinstance(value.get("rows"), list) else [value]
        except (ValueError, RecursionError) as error:
            following = _START.search(text, start + 1)
            end = following.start() if following else len(text)
            cut_off = not following and not text[start:end].rstrip("\n `]").endswith("}")
            unread.append(("cut off" if cut_off else f"not JSON: {error}", text[start:end].rstrip()))
            at = end
    unread += [("a row must be a JSON object", json.dumps(value)) for value in found if not isinstance(value, dict)]
    return [value for value in found if isinstance(value, dict)], unread


def rows_from(text: str, meta: dict, label=lambda answer: None) -> tuple[list[Row], list[tuple[str, str]]]:
    """The rows of a teacher's answer and what could not be read. `meta` fills what a line does not say;
    `label(answer_text)` names the category of an answer, or None."""
    records, unread = objects(text)
    rows = []
    if not records and not unread:
        unread.append(("an empty reply", text))
    for record in records:
        try:
            json.dumps(record, ensure_ascii=False, allow_nan=False).encode()  # NaN or half a surrogate pair: no row
            rows.append(_row(record, meta, label))
        except (ValueError, ValidationError, TypeError) as error:
            unread.append((explain(error), json.dumps(record)))
    return rows, unread


def _row(record: dict, meta: dict, label) -> Row:
    own = {k: record[k] for k in ("language", "group") if isinstance(record.get(k), str) and record[k]}
    if "language" in own:  # "en-GB" is en; of the languages under "other" any code may come back
        code = re.split("[-_]", own["language"])[0].lower()
        own["language"] = "other" if meta.get("language") == "other" else code
    if "input" in record and "output" in record and "instruction" not in record:
        user, output = record["input"], record["output"]
        if not isinstance(user, str):
            raise ValueError("`input` must be a text")
        answer = output if isinstance(output, str) else json.dumps(output, ensure_ascii=False)
        row = make_row(user, answer, **{**meta, **own})
    else:
        left_out = ("id", "meta", "language", "group")
        row = from_any({k: v for k, v in record.items() if k not in left_out}, **{**meta, **own})
    category = label(row.answer)
    return row.noted(category=category) if category else row


def _matters(line: str) -> bool:
    line = line.strip().strip("`[],")
    return bool(line) and line.lower() not in ("json", "jsonl")
