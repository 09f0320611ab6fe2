"""The numbered notebooks through papermill, in order, each run under its id; a failed run resumes where it stopped."""

import json
import re
import sys
import tempfile
import time
from pathlib import Path

from filelock import FileLock, Timeout

from slm.errors import SlmError
from slm.notebook import stale_exports
from slm.registry import file_hash
from slm.rows import write_json
from slm.settings import Settings

PARAMETERS = {"config", "profile", "run_id", "overrides"}


def notebooks(settings: Settings) -> list[Path]:
    """The numbered notebooks in order. Raises SlmError when there are none."""
    found = sorted(settings.path("notebooks").glob("[0-9][0-9]_*.ipynb"))
    if not found:
        raise SlmError(f"{settings.path('notebooks')}: no numbered notebooks here.")
    return found


def select(settings: Settings, stages: list[str]) -> list[Path]:
    """The notebooks named by "all", "04", "04_curate" or a span "03-06". Raises SlmError for one that is not there."""
    known = {path.stem[:2]: path for path in notebooks(settings)}
    picked: set[str] = set()
    for stage in stages:
        span = re.fullmatch(r"(\d\d)-(\d\d)", stage)
        low, high = span.groups() if span else (stage, stage)
        numbers = {n for n in known if stage in ("all", known[n].stem) or low <= n <= high}
        if not numbers:
            raise SlmError(f"no notebook {stage!r}; there are: all, {', '.join(known)}.")
        picked |= numbers
    return [known[number] for number in sorted(picked)]


def check_parameters(path: Path) -> None:
    """Raise SlmError unless the notebook has exactly one cell tagged `parameters` with the four names."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    tagged = [c for c in cells if "parameters" in c.get("metadata", {}).get("tags", [])]
    if len(tagged) != 1:
        raise SlmError(f"{path.name}: {len(tagged)} cells carry the tag `parameters`; exactly one must, or the defaults would run.")
    names = {line.split(":")[0].split("=")[0].strip() for line in "".join(tagged[0]["source"]).splitlines() if "=" in line}
    if missing := PARAMETERS - names:
        raise SlmError(f"{path.name}: the parameters cell lacks {', '.join(sorted(missing))}.")


def run(settings: Settings, stages: list[str], config: str, overrides: dict, resume: bool = False) -> list[dict]:
    """Execute the chosen notebooks; returns one record a stage: name, status, seconds.

    Executed notebooks land in `outputs/runs/<run_id>/notebooks`. With `resume`, stages that are done and whose
    notebook, settings and predecessors are unchanged are skipped. Raises SlmError at the first failing cell.
    """
    chosen = select(settings, stages)
    for path in chosen:
        check_parameters(path)
    for name in stale_exports(settings.root):
        print(f"WARNING: {name} is newer than its exported module; run `nbdev-export`.", file=sys.stderr)
    folder = settings.run_dir
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            return _run(settings, chosen, config, overrides, resume)
    except Timeout:
        raise SlmError(f"run {settings.run_id} is already running; wait for it, or choose another --run-id.") from None


def _run(settings: Settings, chosen: list[Path], config: str, overrides: dict, resume: bool) -> list[dict]:
    file = settings.run_dir / "state.json"
    state = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    done = []
    for path in chosen:
        stamp = f"{settings.hash} {file_hash(path)[:12]}"
        before = state.get(path.stem, {})
        if resume and before.get("status") == "done" and before.get("stamp") == stamp:
            print(f"{path.stem:<14} kept from before ({before['seconds']:.0f} s)")
            done.append({"stage": path.stem, **before})
            continue
        resume = False  # what follows a new stage is new
        begin = time.perf_counter()
        problem = _execute(settings, path, config, overrides)
        record = {"status": "failed" if problem else "done", "seconds": time.perf_counter() - begin, "stamp": stamp}
        state[path.stem] = record
        write_json(file, state)
        if problem:
            raise SlmError(f"{problem}\nMend it, then go on with: python -m slm run {path.stem[:2]}-08 --run-id {settings.run_id}"
                           " (the same options), or the whole command again with --resume.")  # fmt: skip
        print(f"{path.stem:<14} done in {record['seconds']:.0f} s")
        done.append({"stage": path.stem, **record})
    return done


def _execute(settings: Settings, path: Path, config: str, overrides: dict) -> str | None:
    """Run one notebook; returns None, or the sentence that names the notebook, the cell and the cause."""
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError
    from traitlets.config import Config

    target = settings.run_dir / "notebooks" / path.name
    target.parent.mkdir(parents=True, exist_ok=True)
    live = sys.stderr.isatty()
    if not live:
        print(f"{path.stem:<14} running", flush=True)
    try:
        # Sockets in the file system: no port for others on this machine, and no warning about one in the log. A folder of
        # their own: two runs at once would otherwise share them.
        with tempfile.TemporaryDirectory(prefix="slm-") as sockets:
            ipc = {"transport": "ipc", "ip": f"{sockets}/kernel"}
            papermill.execute_notebook(
                str(path), str(target), cwd=str(settings.root), kernel_name="python3", language="python",
                parameters={"config": config, "profile": settings.profile, "run_id": settings.run_id, "overrides": overrides},
                progress_bar={"desc": path.stem, "leave": False} if live else False,
                start_timeout=300,  # seconds; a busy machine takes more than papermill's 60
                config=Config({"KernelManager": {"transport": "tcp"} if sys.platform == "win32" else ipc}),
            )  # fmt: skip
    except PapermillExecutionError as error:
        line = next((x for x in str(error.source or "").splitlines() if x.strip() and not x.startswith("#")), "")
        cause = error.evalue if error.ename == "SlmError" else f"{error.ename}: {error.evalue}"
        return f"{path.name}, cell {error.cell_index} ({line.strip()[:60]}): {cause}"
    except DeadKernelError:
        return f"{path.name}: the kernel died, most likely out of memory; try a smaller batch or model."
    return None
