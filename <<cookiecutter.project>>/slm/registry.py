"""The registry: append-only JSONL files of runs, datasets and looks, locked against a second writer."""

import hashlib
import json
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from filelock import FileLock

from slm.errors import SlmError
from slm.rows import append_jsonl, digest, iter_lines, write_json

SETS = ("dev", "test", "adversarial", "golden")


def file_hash(path: Path) -> str:
    """SHA-256 of a file, as 64 hex digits."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def locked(settings, name: str, timeout: float = -1) -> FileLock:
    """The lock that processes working on `name` hold in turn; they wait `timeout` seconds, by default for good."""
    path = settings.path(f".cache/locks/{name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path, timeout=timeout)


def append(settings, name: str, record: dict) -> dict:
    """Add one line to `registry/<name>.jsonl` with the time and a hash of its content; returns the stored record."""
    record = {**record, "at": datetime.now(UTC).isoformat(timespec="seconds")}
    record["hash"] = digest(json.dumps(record, sort_keys=True, ensure_ascii=False, default=str), 16)
    with locked(settings, name, timeout=60):
        append_jsonl(settings.path(f"registry/{name}.jsonl"), [record])
    return record


def read(settings, name: str) -> list[dict]:
    """All records of a registry file, oldest first; an absent file has none. Raises SlmError on a torn line."""
    path = settings.path(f"registry/{name}.jsonl")
    records = []
    for number, line in iter_lines(path) if path.exists() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            raise SlmError(f"{path}:{number}: not a JSON line; remove it (a write was cut off).") from None
    return records


def latest(settings, name: str, **match) -> dict | None:
    """The newest record whose fields equal `match`."""
    found = (r for r in reversed(read(settings, name)) if match.items() <= r.items())
    return next(found, None)


def lock_sets(settings) -> dict[str, str]:
    """Write the hashes of the four evaluation sets to `data/eval/lock.json`, once; returns them.

    Raises SlmError when a locked set has changed.
    """
    path = settings.path("data/eval/lock.json")
    if path.exists():
        return check_locked(settings)
    hashes = {name: file_hash(settings.path(f"data/eval/{name}.jsonl")) for name in SETS}
    write_json(path, hashes)
    return hashes


def check_locked(settings) -> dict[str, str]:
    """The locked hashes. Raises SlmError when nothing is locked yet, or when a set is not what was locked."""
    path = settings.path("data/eval/lock.json")
    if not path.exists():
        raise SlmError("data/eval/lock.json: the evaluation sets are not locked; run 02_baseline first.")
    hashes = json.loads(path.read_text(encoding="utf-8"))
    for name, expected in hashes.items():
        file = settings.path(f"data/eval/{name}.jsonl")
        if not file.exists() or file_hash(file) != expected:
            mend = "restore it, or delete data/eval/lock.json and run 02_baseline again"
            older = "(older scores then no longer compare)"
            raise SlmError(f"data/eval/{name}.jsonl: changed since it was locked; {mend} {older}.")
    return hashes


def count_look(settings, name: str, run_id: str, why: str) -> int:
    """Record one look at an evaluation set; returns how often it has been looked at. Raises SlmError for `test` before
    the final test: nothing is tuned on it."""
    if name == "test" and not settings.evaluate.final_test:
        raise SlmError("data/eval/test.jsonl: not to be tuned on; use dev, and at the very end evaluate.final_test: true.")
    append(settings, "looks", {"set": name, "run_id": run_id, "why": why})
    return sum(record["set"] == name for record in read(settings, "looks"))


def versions(packages: Iterable[str]) -> dict[str, str]:
    """The installed versions of those of some packages that are there."""
    found = {}
    for name in packages:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
