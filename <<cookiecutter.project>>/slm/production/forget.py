"""Deletion: the rows of one person, or one row, out of every file of the project; a tombstone without content stays.

What a model has learnt cannot be cut out of it: every model trained on such a row is named and refused for release."""

import gzip
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path

from pydantic import BaseModel

from slm import registry
from slm.errors import SlmError
from slm.rows import digest, plain, replacing, write_json, write_text

PENDING = ".cache/forget.json"  # the plan while it is carried out: a deletion that was cut off goes on from it
TOMBSTONES = "forgotten"
GONE = "[FORGOTTEN]"
RUN = 5  # so many words in a row quote a message; reports cut messages short
CACHES = (".cache/answers.sqlite", ".cache/datasets")  # kept under hashes, so they go whole; they fill again
_FOLDERS = {".git", ".venv", "__pycache__", "locks", "slm", "tests", "scripts", "training"}  # not this project's data
_YOURS = ("notebooks/", "task/", "specs/", "project.yaml", "pyproject.toml", "Makefile")  # searched, never written
_UNREAD = {".safetensors", ".gguf", ".bin", ".pt", ".pth", ".png", ".parquet", ".arrow", ".zip"}  # weights, and packed
_WORD = re.compile(r"&#?\w+;|</?[a-z][^<>\n]{0,99}>|\\[nrt]|(\w+)")
_KEYS = ("id", "row_id", "request_id")


class Plan(BaseModel):
    """What goes: ids and groups of rows, their messages, the subject as given; and what was made of it: the dataset
    versions, the runs trained on them, their model files."""

    ids: list[str]
    groups: list[str] = []
    subject: str = ""
    texts: list[str] = []
    locks: dict[str, str] = {}
    files: dict[str, int] = {}
    datasets: list[str] = []
    runs: list[str] = []
    models: list[str] = []

    @cached_property
    def _said(self) -> list[tuple]:
        """The words of each message; of fewer than three anybody may say the same."""
        return [words for words in map(_words, self.texts) if len(words) > 2]

    @cached_property
    def _runs(self) -> set[tuple]:
        return {words[n : n + RUN] for words in self._said for n in range(max(1, len(words) - RUN + 1))}

    def holds(self, text: str, runs: bool = False) -> bool:
        """Whether a text names the subject or holds a whole message, or (`runs`) so many words in a row of one."""
        if self.subject and re.search(rf"(?i)(?<!\w){re.escape(self.subject)}(?!\w)", text):
            return True
        said, sizes = _words(text), {len(run) for run in self._runs}
        if runs:
            return not self._runs.isdisjoint(said[n : n + size] for size in sizes for n in range(len(said) - size + 1))
        joined = f" {' '.join(said)} "
        return any(f" {' '.join(words)} " in joined for words in self._said)

    @property
    def named(self) -> str:
        """A pattern for any of the ids."""
        return "|".join(map(re.escape, self.ids)) or "(?!)"

    def about(self, body) -> bool:
        """Whether a record is one of the rows, speaks of one as its own, or holds a whole message or the subject."""
        if isinstance(body, dict):
            return self._own(body) or any(map(self.about, body.values()))
        return any(map(self.about, body)) if isinstance(body, list) else isinstance(body, str) and self.holds(body)

    def redact(self, text: str) -> str:
        """The text without the lines that name the subject or quote a message."""
        return "\n".join(GONE if self.holds(line, runs=True) else line for line in text.split("\n"))

    def pruned(self, body):
        """JSON without the rows' records and quotations; a notebook's cell that names or quotes a row shows nothing."""
        if isinstance(body, list):
            return [self.pruned(one) for one in body if not (isinstance(one, dict) and self._own(one))]
        if not isinstance(body, dict):
            return GONE if isinstance(body, str) and self.holds(body, runs=True) else body
        new, shown = {key: self.pruned(value) for key, value in body.items()}, json.dumps(body.get("outputs"))
        told = json.dumps(new.get("outputs")) != shown or re.search(rf"(?<![\w-])(?:{self.named})(?![\w-])", shown)
        if "cell_type" in body and told:
            new["outputs"] = []
        return new

    def _own(self, record: dict) -> bool:
        known = record.get("group") in self.groups or any(record.get(key) in self.ids for key in _KEYS)
        return known or self.holds(str(record.get("raw", "")), runs=True)  # raw: a torn line that 04 refused


def plan(settings, subject: str = "", row_id: str = "") -> Plan:
    """What belongs to a subject (the `group` of a log, or what names a person: an address, a whole name) or to a row
    id; of a deletion that was cut off, its own plan. Nothing is changed. Raises SlmError, which never repeats the
    subject, when there is nothing."""
    if (file := settings.path(PENDING)).is_file():
        return Plan.model_validate_json(file.read_bytes())
    if bool(subject) == bool(row_id) or subject and len(subject.strip()) < 3:
        raise SlmError("forget: give --row, or --subject with at least three characters.")
    groups = [subject.strip(), "production-" + digest(plain(subject))] if subject else []
    found = Plan(ids=[row_id] if row_id else [], groups=groups, subject=subject.strip())

    def own() -> list[tuple[str, dict]]:
        records = ((_name(settings, path), record) for path in _files(settings) for record in _records(path))
        return [(name, record) for name, record in records if any(map(_texts, _dicts(record))) and found.about(record)]

    texts = {text for _, record in own() for part in _dicts(record) for text in _texts(part)}
    if not texts and not any(map(found.holds, map(_text, _files(settings)))):
        raise SlmError("forget: no row, log line or file holds that; nothing was changed. Ids stand in data/ and logs.")
    locks = registry.check_locked(settings) if settings.path("data/eval/lock.json").is_file() else {}
    found = Plan(**found.model_dump(exclude={"texts", "locks"}), texts=sorted(texts), locks=locks)
    mine = own()  # now the same message under another id, too
    ids = (part.get(key) for _, record in mine for part in _dicts(record) for key in _KEYS)
    found.ids = sorted({*found.ids, *(one for one in ids if isinstance(one, str))})
    found.files = Counter(name for name, _ in mine)
    for record in registry.read(settings, "datasets"):
        archive = f"registry/datasets/{record['version']}.jsonl.gz"
        unseen = not settings.path(archive).is_file() and {*record["parents"]} & {*found.files}
        if archive in found.files or unseen:
            found.datasets.append(record["version"])
    done = ("train", "completed")
    trained = [r for r in registry.read(settings, "runs") if (r.get("stage"), r.get("status")) == done]
    fed = {None} if any(not name.startswith("data/eval/") for name in found.files) else set()  # a run without a version
    found.runs = sorted({r["run_id"] for r in trained if r["parents"]["dataset"] in {*found.datasets, *fed}})
    places = [settings.path(f"outputs/{kind}/{run}") for run in found.runs for kind in ("adapters", "merged", "gguf")]
    files = (sorted(place.glob("*.gguf")) or [place] for place in places if place.exists())
    found.models = [_name(settings, file) for part in files for file in part]
    return found


def forget(settings, found: Plan) -> dict:
    """Carry a plan out: rows leave every file and cache, reports lose what they quote, changed evaluation sets are
    locked anew, every file is searched, and the tombstone is written; returns it. Raises SlmError that names the files
    in which something is left: the plan is kept until nothing is."""
    with ExitStack() as stack:
        for name in ("teacher", "decisions", "accepted"):  # 03, a reviewer and 04 wait
            stack.enter_context(registry.locked(settings, name))
        write_text(settings.path(PENDING), found.model_dump_json())
        for cache in map(settings.path, CACHES):
            shutil.rmtree(cache) if cache.is_dir() else cache.unlink(missing_ok=True)
        changed = [_name(settings, path) for path in _files(settings) if _clean(settings, path, found)]
        now = {name: registry.file_hash(settings.path(f"data/eval/{name}.jsonl")) for name in found.locks}
        if now != found.locks:
            write_json(settings.path("data/eval/lock.json"), now)
        if left := [_name(settings, path) for path in _files(settings) if found.holds(_text(path))]:
            raise SlmError(f"forget: still in {', '.join(left)}; remove it there by hand, then run forget again.")
        record = {
            "rows": found.ids, "groups": [digest(group) for group in found.groups],
            "files": sorted({*changed, *found.files}), **found.model_dump(include={"datasets", "runs", "models"}),
            "relocked": {name: [old, now[name]] for name, old in found.locks.items() if now[name] != old},
        }  # fmt: skip
        record = registry.append(settings, TOMBSTONES, record)
        settings.path(PENDING).unlink()
    return record


def told(found: Plan) -> str:
    """A plan in words for the terminal, without any of the content."""
    where = ", ".join(f"{n} in {name}" for name, n in found.files.items()) or "quoted only"
    lines = [f"{sum(found.files.values())} rows and lines: {where}"]
    lines += [f"dataset version {version} holds some" for version in found.datasets]
    lines += [f"run {run} was trained on them: train it again, it is not released any more" for run in found.runs]
    lines += [f"{model}: delete it, and every copy that was handed out" for model in found.models]
    lines.append("Not reached from here: git's history, hubs, trackers, backups, zip and Parquet files, other logs.")
    return "\n".join(lines)


def refuse(settings, run_id: str) -> None:
    """Raises SlmError for a run that was trained on a row before it was forgotten, and while a deletion is cut off."""
    if settings.path(PENDING).is_file():
        raise SlmError("a deletion was cut off half way; run `python -m slm forget` once more, it goes on by itself.")
    trained = registry.latest(settings, "runs", stage="train", status="completed", run_id=run_id) or {"at": ""}
    for tomb in registry.read(settings, TOMBSTONES):
        if run_id in tomb["runs"] and trained["at"] <= tomb["at"]:
            what = f"it was trained on rows that were forgotten on {tomb['at'][:10]}"
            raise SlmError(f"run {run_id}: {what}; delete its model, then run 04, 05, 06 and 08 again.")


def _files(settings) -> Iterator[Path]:
    for folder, inner, names in os.walk(settings.root):
        inner[:] = sorted(set(inner) - _FOLDERS)
        files = (Path(folder, name) for name in sorted(names))
        yield from (f for f in files if f.suffix not in _UNREAD and not f.is_symlink() and f != settings.path(PENDING))


def _name(settings, path: Path) -> str:
    return path.relative_to(settings.root).as_posix()


def _words(text: str) -> tuple[str, ...]:
    return tuple(hit[1].lower() for hit in _WORD.finditer(text) if hit[1])


def _by_line(path: Path) -> bool:
    return ".jsonl" in path.name or path.name.endswith(".unread.txt")


def _text(path: Path, raw: bool = False) -> str:
    """A file's text, unpacked; of a binary file what reads as text. JSON's \\u escapes are resolved unless `raw`."""
    text = (gzip.decompress if path.suffix == ".gz" else bytes)(path.read_bytes()).decode("utf-8", "replace")
    return text if raw else re.sub(r"\\u([0-9a-f]{4})", lambda hit: chr(int(hit[1], 16)), text)


def _json(text: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _records(path: Path) -> Iterator[dict]:
    lines = _text(path, raw=True).split("\n") if _by_line(path) else ()
    return (record for record in map(_json, lines) if isinstance(record, dict))


def _dicts(body) -> Iterator[dict]:
    if isinstance(body, dict):
        yield body
    for part in body.values() if isinstance(body, dict) else body if isinstance(body, list) else ():
        yield from _dicts(part)


def _texts(record: dict) -> list[str]:
    """What a person wrote: the user's messages of a row, the input of a log line."""
    said = [m["content"] for m in record.get("messages") or () if isinstance(m, dict) and m.get("role") == "user"]
    return [text for text in (*said, record.get("input")) if isinstance(text, str)]


def _clean(settings, path: Path, found: Plan) -> bool:
    """Take rows and quotations out of a file; whether it changed."""
    name, packed, text = _name(settings, path), path.suffix == ".gz", _text(path, raw=True)
    if name.startswith(_YOURS):
        return False
    if "\0" in text:  # a database: of the cache it goes whole, any other is searched at the end
        if cached := name.startswith(".cache/") and found.redact(_text(path)) != _text(path):
            path.unlink()
        return cached
    if _by_line(path):  # a record that only quotes stays, without the quotation; a row goes
        quotes = name.startswith("registry/") and not packed and path.stem != "judge"
        new = "".join(_line(line, found, quotes) for line in re.split(r"(?<=\n)", text))
    elif path.suffix in (".json", ".ipynb") and (body := _json(text)) is not None:
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


def _line(line: str, found: Plan, quotes: bool) -> str:
    record = _json(line)
    if record is None or not quotes:  # None: torn
        return "" if found.redact(line) != line and record is None or found.about(record) else line
    new = found.pruned(record)
    return line if new == record else json.dumps(new, ensure_ascii=False) + "\n"
