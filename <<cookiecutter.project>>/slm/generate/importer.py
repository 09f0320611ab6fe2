"""Bring your own rows: JSONL in the four formats, CSV, Parquet and `datasets` become rows, a whole file or none."""

import csv
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from slm.errors import SlmError
from slm.rows import Row, explain, from_any, iter_lines, make_row, replacing

CONTENT = ("messages", "instruction", "input", "output", "prompt", "chosen", "rejected")
TERMS = ("license", "consent")
FACTS = ("category", "kind", "difficulty", "language", "group")
SHOWN = 5  # bad lines that are named before the import gives up


def import_rows(settings, file: str, columns="", source="human", out="", split="train") -> tuple[Path, int]:
    """Write the rows of a file, a folder saved by `datasets`, or a set on the Hub to `out` (data/generated/<name>.jsonl);
    returns it and the number of rows. `columns` is "target=column,…": user, answer or answer.<field>, the fields of the
    four formats, category, kind, difficulty, language, group, license, consent; without it each record is one of the
    four formats. Raises SlmError with file:line (Parquet, datasets: row) of the first bad lines. No file is replaced or
    half written."""
    wanted = _columns(columns)
    target = settings.path(out or f"data/generated/{Path(file).stem if Path(file).exists() else Path(file).name}.jsonl")
    if target.exists():
        raise SlmError(f"{target}: it exists already; remove it, or name another file with --out.")
    path = settings.path("specs/output_schema.json")
    schema = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    seen, bad = set(), []
    with replacing(target) as stream:
        for place, number, record in _records(file, split):
            try:
                row = _row(record, wanted, schema, {"category": "all", "source": source})
                row = row.noted(provenance={"batch": target.stem, "imported": Path(file).name, "line": number})
                terms = {name: str(record[wanted[name]]).lower() for name in TERMS if name in wanted}
                row = row.noted(provenance=terms)
                row = row.model_copy(update={"id": f"{row.id}-{number}"}) if row.id in seen else row
                stream.write(json.dumps(row.model_dump(exclude_none=True), ensure_ascii=False).encode() + b"\n")
                seen.add(row.id)
            except (ValueError, TypeError) as error:  # pydantic's errors are ValueErrors too
                bad.append(f"{place}: {explain(error)}")
                if len(bad) == SHOWN:
                    break
        if bad or not seen:
            raise SlmError("\n".join(bad or [f"{file}: no rows"]) + "\nNothing was written; mend this, then import again.")
    return target, len(seen)


def _columns(text: str) -> dict[str, str]:
    wanted = {t.strip(): c.strip() for t, _, c in (part.partition("=") for part in text.split(",") if part.strip())}
    known = ("user", "answer", *FACTS, *TERMS, *CONTENT)
    for target, column in wanted.items():
        if not column or target not in known and not target.startswith("answer."):
            raise SlmError(f"--columns {target}={column}: write target=column; targets: answer.<field>, {', '.join(known)}.")
    return wanted


def _row(record, wanted: dict[str, str], schema: dict, meta: dict) -> Row:
    if not isinstance(record, dict):
        raise record if isinstance(record, Exception) else ValueError("a line must be a JSON object")
    if missing := [column for column in wanted.values() if column not in record]:
        raise ValueError(f"no column {missing[0]!r}; there are {', '.join(map(str, record))}")
    found = {t: record[c] for t, c in wanted.items()} or {k: v for k, v in record.items() if v is not None}
    if not wanted and "messages" in found and "meta" in found:
        return from_any(found)
    meta |= {name: str(found[name]) for name in FACTS if wanted and found.get(name) not in (None, "")}
    if "user" not in wanted:
        return from_any({k: v for k, v in found.items() if not wanted or k in CONTENT and v is not None}, **meta)
    fields = {t.removeprefix("answer."): v for t, v in found.items() if t.startswith("answer.")}
    answer = {name: _fit(name, value, schema) for name, value in fields.items()} or found.get("answer")
    if not isinstance(answer, str | None):
        answer = json.dumps(answer, ensure_ascii=False, separators=(",", ":"))
    for name, text in (("user", found["user"]), ("answer", answer)):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"the {name} is empty or no text")
    return make_row(found["user"], answer, rejected=found.get("rejected"), **meta)


def _fit(name: str, value, schema: dict):
    """A cell as the output schema wants it there: the value, nothing (an empty cell), or the JSON that it spells."""
    from jsonschema import Draft202012Validator

    definitions = schema.get("$defs", {})
    branches = [schema] if name in schema.get("properties", {}) else definitions.values()  # a union's alternatives
    nodes = [{**b["properties"][name], "$defs": definitions} for b in branches if name in b.get("properties", {})]
    values = [None, value] if value == "" else [value]
    for text in (value, value.lower()) if isinstance(value, str) else ():
        with suppress(ValueError):
            values.append(json.loads(text))
    for one in values:
        if not nodes or any(Draft202012Validator(node).is_valid(one) for node in nodes):
            return one
    raise ValueError(f"{name}: {value!r} is not what specs/output_schema.json allows")


def _records(file: str, split: str) -> Iterator[tuple[str, int, object]]:
    """(place, line or row number, record or the error in its place)."""
    path = Path(file)
    kind = "datasets" if path.is_dir() or not (path.exists() or path.suffix) else path.suffix
    readers = {".jsonl": _jsonl, ".csv": _csv, ".tsv": _csv, ".parquet": _datasets, "datasets": _datasets}
    if kind not in readers or not (path.exists() or kind == "datasets"):
        what = "give .jsonl, .csv, .tsv, .parquet, a folder or a Hub id" if path.exists() else "there is no such file"
        raise SlmError(f"{file}: {what}.")
    for number, record in readers[kind](file, split):
        yield f"{file}{': row ' if kind in ('.parquet', 'datasets') else ':'}{number}", number, record


def _jsonl(file: str, _):
    for number, line in iter_lines(Path(file)):
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, ValueError(f"not JSON: {error}")


def _csv(file: str, _):
    def lines():
        return (line for _, line in iter_lines(Path(file), blank=True))

    reader = csv.reader(lines(), delimiter=max(",;\t", key=next(lines(), "").count), strict=True)
    header = next(reader, [])
    start = reader.line_num + 1  # a quoted cell may hold line breaks: this is the physical line
    try:
        for cells in reader:
            wrong = ValueError(f"{len(cells)} fields, but the header has {len(header)}")
            if cells:
                yield start, dict(zip(header, cells, strict=True)) if len(cells) == len(header) else wrong
            start = reader.line_num + 1
    except csv.Error as error:
        yield start, ValueError(f"{error} (the record ends in line {reader.line_num})")


def _datasets(file: str, split: str):
    try:
        import datasets

        if file.endswith(".parquet"):
            data = datasets.Dataset.from_parquet(file)
        else:
            data = datasets.load_from_disk(file) if Path(file).is_dir() else datasets.load_dataset(file, split=split)
        data = data[split] if isinstance(data, dict) else data
    except Exception as error:  # no network, no such set, no such split: the library raises a dozen types
        raise SlmError(f"{file} (split {split}): `datasets` cannot load it ({type(error).__name__}: {error}).") from None
    names = {name: kind for name, kind in data.features.items() if isinstance(kind, datasets.ClassLabel)}
    for number, record in enumerate(data, 1):
        yield number, {k: names[k].int2str(v) if k in names and v is not None else v for k, v in record.items()}
