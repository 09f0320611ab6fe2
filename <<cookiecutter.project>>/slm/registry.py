"""The registry: append-only JSONL files of runs, datasets and looks, locked against a second writer."""

import hashlib
import json
import os
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock

from slm.errors import SlmError
from slm.rows import write_json

SETS = ("dev", "test", "adversarial", "golden")


def file_hash(path: Path) -> str:
    """SHA-256 of a file, or of a folder's files with their names, as 64 hex digits."""
    digest = hashlib.sha256()
    path = Path(path)
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for file in files:
        if path.is_dir():
            digest.update(str(file.relative_to(path)).encode())
        with file.open("rb") as stream:
            for block in iter(lambda: stream.read(1 << 20), b""):
                digest.update(block)
    return digest.hexdigest()


def append(settings, name: str, record: dict) -> dict:
    """Add one line to `registry/<name>.jsonl` with the time and a hash of its content; returns the stored record."""
    path = settings.path(f"registry/{name}.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {**record, "at": datetime.now(UTC).isoformat(timespec="seconds")}
    body = json.dumps(record, sort_keys=True, ensure_ascii=False, default=str)
    record["hash"] = hashlib.sha256(body.encode()).hexdigest()[:16]
    line = json.dumps(record, ensure_ascii=False, default=str) + "\n"
    lock = settings.path(f".cache/locks/{name}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock, timeout=60), path.open("ab") as stream:
        stream.write(line.encode())
        stream.flush()
        os.fsync(stream.fileno())
    return record


def read(settings, name: str) -> list[dict]:
    """All records of a registry file, oldest first; an absent file has none. Raises SlmError on a torn line."""
    path = settings.path(f"registry/{name}.jsonl")
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            records.append(json.loads(line))
        except ValueError:
            raise SlmError(f"{path}:{number}: not a JSON line; remove it (a write was cut off).") from None
    return records


def latest(settings, name: str, **match) -> dict | None:
    """The newest record whose fields equal `match`."""
    for record in reversed(read(settings, name)):
        if all(record.get(key) == value for key, value in match.items()):
            return record
    return None


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
            raise SlmError(
                f"data/eval/{name}.jsonl: changed since it was locked; restore it, or delete data/eval/lock.json "
                "and run 02_baseline again (older scores then no longer compare)."
            )
    return hashes


def count_look(settings, name: str, run_id: str, why: str) -> int:
    """Record one look at an evaluation set; returns how often it has been looked at. Raises SlmError for `test` before
    the final test: nothing is tuned on it."""
    if name == "test" and not settings.evaluate.final_test:
        raise SlmError("data/eval/test.jsonl: not to be tuned on; use dev, and at the very end evaluate.final_test: true.")
    append(settings, "looks", {"set": name, "run_id": run_id, "why": why})
    return sum(record["set"] == name for record in read(settings, "looks"))
