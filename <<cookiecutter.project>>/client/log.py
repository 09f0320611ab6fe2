"""A log of requests for flywheel.ipynb: one JSON line each, written by a thread of its own, so that no caller waits.
Works anywhere; needs Python, no more. What a line holds: README.md beside this file."""

import atexit
import errno
import json
import os
import queue
import sys
import threading
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path


class Log:
    """`write` puts a line into a queue of at most `waiting` and returns at once. When the queue is full, or the disk,
    the line is lost, counted in `dropped`, said on standard error, and the log says how many. At `max_bytes` the file
    becomes <name>.1, that one <name>.2; the oldest of `files` goes. One process per file."""

    def __init__(self, path, model_version: str, max_bytes: int = 20_000_000, files: int = 10, waiting: int = 10_000):
        self.path, self.model_version, self.max_bytes, self.files = Path(path), model_version, max_bytes, max(1, files)
        self.waiting, self.written, self.dropped, self._unsaid, self._told = waiting, 0, 0, 0, float("-inf")
        self._start()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._start)  # a server that forks has no thread in its children
        atexit.register(self.close)

    def write(
        self, input: str, output: str, latency_s: float, parse_ok: bool, *, consent: bool, group: str = "",
        correction: str | None = None, request_id: str = "", license: str = "", confidence: float | None = None,
        tokens_in: int | None = None, tokens_out: int | None = None, model_version: str = "",
    ) -> str:  # fmt: skip
        """One request; returns its id, which a later correction needs. `consent`: may it be used to improve the model?
        `group`: customer or conversation, as an opaque number. `correction`: the right answer as contract JSON.
        `confidence`: how sure the model was, 0 to 1; it and the tokens of prompt and answer where they are known.
        `model_version`: the one that answered, where two share a log."""
        request_id = request_id or uuid.uuid4().hex
        facts = {"input": input, "output": output, "latency_s": latency_s, "parse_ok": parse_ok}
        version = model_version or self.model_version
        terms = {"correction": correction, "model_version": version, "group": group, "consent": consent, "license": license}
        known = {"confidence": confidence, "tokens_in": tokens_in, "tokens_out": tokens_out}
        self._put({"request_id": request_id, **facts, **terms, **known})
        return request_id

    def correct(self, request_id: str, correction: str) -> None:
        """What the user says the answer should have been."""
        self._put({"request_id": request_id, "correction": correction})

    def withdraw(self, request_id: str) -> None:
        """The customer does not want this request to be used any more."""
        self._put({"request_id": request_id, "consent": False})

    def close(self, timeout: float = 5.0) -> int:
        """Write what waits, for `timeout` seconds at most; returns how many lines were lost in all."""
        if self._thread.is_alive():
            try:
                self._queue.put(None, timeout=timeout)
            except queue.Full:
                pass
            self._thread.join(timeout)
            self._lose(self._queue.qsize() if self._thread.is_alive() else 0)
        return self.dropped

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _start(self) -> None:
        self._queue, self._lock = queue.Queue(self.waiting), threading.Lock()
        self._thread = threading.Thread(target=self._run, name="request log", daemon=True)
        self._thread.start()

    def _put(self, record: dict) -> None:
        try:
            if not self._thread.is_alive():
                raise queue.Full
            self._queue.put_nowait(record | {"time": datetime.now(UTC).isoformat(timespec="milliseconds")})
        except queue.Full:
            self._lose(1)

    def _run(self) -> None:
        while True:
            batch = [self._queue.get()]
            while len(batch) < 1000 and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            self._save([record for record in batch if record is not None])
            if None in batch:  # close() was called
                return

    def _save(self, batch: list[dict]) -> None:
        lines = [line for line in map(self._line, batch) if line]
        self._lose(len(batch) - len(lines))
        with self._lock:
            lost, self._unsaid = self._unsaid, 0
        said = [self._line({"dropped": lost, "time": datetime.now(UTC).isoformat()})] if lost else []
        while lines or said:
            part = lines[:100]
            try:
                self._append(b"".join(said + part))
                self.written += len(part)
                lines, said, lost = lines[len(part) :], [], 0
            except OSError as error:
                with self._lock:
                    self._unsaid += lost
                self._lose(len(lines), f" ({error.strerror})")
                return

    def _line(self, record: dict) -> bytes:
        try:
            return json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        except (TypeError, ValueError, RecursionError):
            return b""  # no text: counted with the lost

    def _append(self, data: bytes) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and self.path.stat().st_size + len(data) > self.max_bytes:
            for number in range(self.files - 1, 0, -1):
                old = self.path if number == 1 else self._old(number - 1)
                if old.exists():
                    os.replace(old, self._old(number))
            if self.files == 1:
                self.path.unlink()
        with self.path.open("ab+", buffering=0) as stream:
            begin = stream.seek(0, os.SEEK_END)
            if begin and (stream.seek(-1, os.SEEK_END), stream.read(1))[1] != b"\n":  # the process before died writing
                data = b"\n" + data
            try:
                if stream.write(data) < len(data):
                    raise OSError(errno.ENOSPC, "no space left")
            except OSError:
                stream.truncate(begin)  # half a line would spoil the next
                raise

    def _old(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}")

    def _lose(self, count: int, why: str = "") -> None:
        if not count:
            return
        with self._lock:
            self.dropped += count
            self._unsaid += count
            say, now = time.monotonic() - self._told > 60, time.monotonic()  # once a minute is enough
            self._told = now if say else self._told
        if say:
            print(f"{self.path}: {self.dropped} lines lost so far, the log cannot keep up{why}.", file=sys.stderr)
