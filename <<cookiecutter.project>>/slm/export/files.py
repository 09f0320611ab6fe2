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
        need = f"{what} needs {needed / 1e6:,.0f} MB and the disk has {free / 1e6:,.0f} MB free"
        raise SlmError(f"{folder}: {need}; make room, run again.")


@contextmanager
def whole(target: Path) -> Iterator[Path]:
    """A path that becomes `target`, a file or a folder, when the block ends well; otherwise nothing is left of it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(f".{target.name}.*"):  # of a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        work = Path(folder) / target.name
        try:
            yield work
            if target.is_dir():  # moved away whole: a kill now leaves none, not half a folder
                os.replace(target, Path(folder) / "old")
            os.replace(work, target)
        except OSError as error:
            why = error.strerror or error
            raise SlmError(f"{target}: cannot write ({why}); nothing half-written was left.") from None


def weight_bytes(folder: Path) -> int:
    """Bytes of a checkpoint's weight files."""
    return sum(f.stat().st_size for f in Path(folder).glob("*.safetensors"))
