"""Large outputs arrive whole or not at all: room is checked first, work happens beside the target, a rename ends it."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slm.errors import SlmError


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raises SlmError when the disk that holds `folder` has fewer than `needed` bytes free."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise SlmError(
            f"{folder}: {what} needs {needed / 1e6:,.0f} MB and the disk has {free / 1e6:,.0f} MB free; make room, run again."
        )


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A working folder that becomes `target` when the block ends well, replacing it; otherwise it is removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        with _clear(target):
            yield work
            os.chmod(work, 0o755)
            shutil.rmtree(target, ignore_errors=True)
            os.replace(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A temporary path that becomes `target` when the block ends well; otherwise it is removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with _clear(target):
            yield work
            os.replace(work, target)
    finally:
        work.unlink(missing_ok=True)


@contextmanager
def _clear(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SlmError(f"{target}: cannot write ({error.strerror or error}); nothing half-written was left.") from None


def weight_bytes(folder: Path) -> int:
    """Bytes of a checkpoint's weight files."""
    return sum(f.stat().st_size for f in Path(folder).glob("*.safetensors"))
