"""Bring your own rows: JSONL in the four formats, CSV, Parquet and `datasets` become rows, a whole file or none."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from slm.errors import SlmError
from slm.rows import Row, explain, from_any, iter_lines, make_row

CONTENT = ("messages", "instruction", "input", "output", "prompt", "chosen", "rejected")
FACTS = ("category", "kind", "difficulty", "language", "group")
SHOWN = 5  # bad lines that are named before the import gives up


def import_rows(
    settings, file: str, columns: str = "", source: str = "human", out: str = "", split: str = "train"
) -> tuple[Path, int]:
    """Write the rows of a file, a folder saved by `datasets`, or a data set on the Hub to `out` (data/generated/<name>.jsonl);
    returns it and the number of rows. `columns` is "target=column,…"; targets are user, answer, answer.<field>, the
    fields of the four formats, and category, kind, difficulty, language, group; without it each record must be one of
    the four formats. Raises SlmError with file:line (Parquet, datasets: row) of the first bad lines; nothing is
    written then, and no file is replaced."""
    wanted, name = _columns(columns), Path(file).stem if Path(file).exists() else file.rsplit("/", 1)[-1]
    target = settings.path(out or f"data/generated/{name}.jsonl")
    if target.exists():
        raise SlmError(f"{target}: it exists already; remove it, or name another file with --out.")
    schema = settings.path("specs/output_schema.json")
    types = _types(json.loads(schema.read_text(encoding="utf-8"))) if schema.is_file() else {}
    part, seen, bad, count = target.with_name(f".{target.name}.part"), set(), [], 0
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with part.open("w", encoding="utf-8") as stream:
            for place, number, record in _records(file, split):
                try:
                    if isinstance(record, Exception):
                        raise record
                    row = _row(record, wanted, types, {"category": "all", "source": source})
                    made = {**row.meta.provenance, "batch": target.stem, "imported": Path(file).name, "line": number}
                    again = {"id": f"{row.id}-{number}"} if row.id in seen else {}
                    row = row.model_copy(update={"meta": row.meta.model_copy(update={"provenance": made}), **again})
                    stream.write(json.dumps(row.model_dump(exclude_none=True), ensure_ascii=False) + "\n")
                except (ValueError, TypeError) as error:  # pydantic's errors and bad surrogates are ValueErrors too
                    bad.append(f"{place}: {explain(error)}")
                    if len(bad) == SHOWN:
                        break
                else:
                    seen.add(row.id)
                    count += 1
            stream.flush()
            os.fsync(stream.fileno())
        if bad or not count:
            raise SlmError("\n".join(bad or [f"{file}: no rows"]) + "\nNothing was written; mend these lines, then import again.")
        os.replace(part, target)
    except OSError as error:
        raise SlmError(f"{target}: cannot write ({error.strerror}); nothing was changed.") from None
    finally:
        part.unlink(missing_ok=True)
    return target, count


def _columns(text: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    wanted = {target.strip(): column.strip() for target, _, column in pairs}
    for target, column in wanted.items():
        if not column or not (target in ("user", "answer", *CONTENT, *FACTS) or target.startswith("answer.")):
            known = ", ".join(("user", "answer", "answer.<field>", *FACTS, *CONTENT))
            raise SlmError(f"--columns {target}={column}: write target=column; targets are {known}.")
    return wanted


def _row(record: dict, wanted: dict[str, str], types: dict[str, set], meta: dict) -> Row:
    if not wanted:
        return from_any({k: v for k, v in record.items() if v is not None}, **meta)
    if missing := [column for column in wanted.values() if column not in record]:
        raise ValueError(f"no column {missing[0]!r}; there are {', '.join(map(str, record))}")
    found = {target: record[column] for target, column in wanted.items()}
    meta |= {name: str(found[name]) for name in FACTS if found.get(name) not in (None, "")}
    if "user" not in found:
        return from_any({k: found[k] for k in CONTENT if found.get(k) is not None}, **meta)
    answer = found.get("answer")
    if fields := {t.removeprefix("answer."): v for t, v in found.items() if t.startswith("answer.")}:
        order = sorted(fields, key=lambda name: list(types).index(name) if name in types else len(types))
        answer = {name: _value(name, fields[name], types.get(name, set())) for name in order}
    if not isinstance(answer, str | None):
        answer = json.dumps(answer, ensure_ascii=False, separators=(",", ":"))
    for name, text in (("user", found["user"]), ("answer", answer)):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"the {name} is empty or no text")
    return make_row(found["user"], answer, rejected=found.get("rejected"), **meta)


def _value(name: str, value, types: set):
    """A cell of a CSV file as what the output schema wants there."""
    if not isinstance(value, str) or not types or ("string" in types and (value or "null" not in types)):
        return value
    if not value and "null" in types:
        return None
    for text in (value, value.lower()):
        try:
            return json.loads(text)
        except ValueError:
            continue
    raise ValueError(f"{name}: {value!r} is not {' or '.join(sorted(types))}")


def _types(schema: dict) -> dict[str, set]:
    """The JSON types of each field of the output, in the schema's order; those of a union's branches together."""
    definitions, found = schema.get("$defs", {}), {}

    def parts(node: dict) -> list[dict]:
        node = definitions.get(node.get("$ref", "").rsplit("/", 1)[-1], node)
        return [part for key in ("anyOf", "oneOf", "allOf") for one in node.get(key, ()) for part in parts(one)] or [node]

    for branch in parts(schema):
        for name, node in branch.get("properties", {}).items():
            for part in parts(node):
                values = part.get("enum", [part["const"]] if "const" in part else [])
                found.setdefault(name, set()).update({part["type"]} if "type" in part else {"string"} if values else ())
    return found


def _records(file: str, split: str) -> Iterator[tuple[str, int, dict | Exception]]:
    """(place, line or row number, record or what is wrong with it)."""
    path = Path(file)
    kind = "datasets" if path.is_dir() or not (path.exists() or path.suffix) else path.suffix
    readers = {".jsonl": _jsonl, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet, "datasets": _datasets}
    if kind not in readers or not (path.exists() or kind == "datasets"):
        what = "there is no such file" if not path.exists() else "give .jsonl, .csv, .tsv, .parquet, a folder or a Hub id"
        raise SlmError(f"{file}: {what}.")
    between = ":" if kind in (".jsonl", ".csv", ".tsv") else ": row "
    for number, record in readers[kind](file, split):
        yield f"{file}{between}{number}", number, record


def _jsonl(file: str, _):
    for number, line in iter_lines(Path(file)):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            record = ValueError(f"not JSON: {error}")
        yield number, record if isinstance(record, dict | Exception) else ValueError("a line must be a JSON object")


def _csv(file: str, _):
    import csv

    def lines():
        with open(file, "rb") as stream:
            for number, line in enumerate(stream, 1):
                try:
                    yield line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError:
                    raise SlmError(f"{file}:{number}: not UTF-8; save the file as UTF-8.") from None

    first = next(lines(), "")
    reader = csv.reader(lines(), delimiter=max(",;\t", key=first.count), strict=True)
    header, start = next(reader, []), reader.line_num + 1
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield start, ValueError(f"{error} (record from line {start} to {reader.line_num})")
            return
        if cells is None:
            return
        if cells:
            wrong = ValueError(f"{len(cells)} fields, but the header has {len(header)}")
            yield start, dict(zip(header, cells, strict=True)) if len(cells) == len(header) else wrong
        start = reader.line_num + 1


def _parquet(file: str, _):
    try:
        import pyarrow.parquet
    except ImportError:
        raise SlmError(f"{file}: reading Parquet needs pyarrow; pip install pyarrow.") from None
    try:
        batches = pyarrow.parquet.ParquetFile(file).iter_batches()
        yield from enumerate((record for batch in batches for record in batch.to_pylist()), 1)
    except pyarrow.ArrowException as error:
        raise SlmError(f"{file}: not a Parquet file that can be read ({error}).") from None


def _datasets(file: str, split: str):
    import datasets

    try:
        data = datasets.load_from_disk(file) if Path(file).is_dir() else datasets.load_dataset(file, split=split)
        data = data[split] if isinstance(data, dict) else data
    except Exception as error:  # no network, no such set, no such split: the library raises a dozen types
        raise SlmError(f"{file} (split {split}): `datasets` cannot load it ({type(error).__name__}: {error}).") from None
    names = {name: kind for name, kind in data.features.items() if isinstance(kind, datasets.ClassLabel)}
    for number, record in enumerate(data, 1):
        yield number, {k: names[k].int2str(v) if k in names and v is not None else v for k, v in record.items()}
