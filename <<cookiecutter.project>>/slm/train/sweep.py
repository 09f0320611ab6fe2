"""A grid of reruns of the numbered notebooks, a process each, here or on a Ray cluster: score against cost, over seeds."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import Field, ValidationError

from slm import registry, runner
from slm.cluster import connect
from slm.curate.versions import split_of
from slm.errors import SlmError
from slm.evaluate import Metric, load_candidate, seeds
from slm.evaluate.candidate import NAME
from slm.report.tables import markdown
from slm.rows import Record, digest, explain, write_text
from slm.settings import load_settings

SHORT = {"base": "model.base", "rank": "train.lora_rank", "learning_rate": "train.learning_rate", "data": "train.dataset",
         "seed": "train.seed"}  # fmt: skip


class Sweep(Record):
    """grid.yaml: `grid` lists the values of each setting (a dotted name, or one of SHORT), `settings` hold for every
    cell. `workers` cells run at once here; on Ray each takes so many `cpus` and `gpus`."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,40}$")
    profile: str = "default"
    stages: list[str] = ["05-06"]
    settings: dict = {}
    grid: dict[str, Annotated[list, Field(min_length=1)]] = Field(min_length=1)
    workers: int = Field(1, ge=1)
    cpus: float = Field(1, gt=0)
    gpus: float = Field(0, ge=0)

    @property
    def cells(self) -> dict[str, dict]:
        """Run id -> the cell's own settings; the same cell has the same id whatever else is in the grid."""
        names = [SHORT.get(name, name) for name in self.grid]
        found = [dict(zip(names, values, strict=True)) for values in itertools.product(*self.grid.values())]
        return {f"{self.name}-{digest(json.dumps([self.settings, cell], sort_keys=True, default=str), 8)}": cell for cell in found}


def sweep(file: Path, config: str = "project.yaml", ray: str = "") -> list[dict]:
    """Run every cell of a grid file that is not done yet; returns the table's lines, one per cell without its seed, also
    in outputs/sweeps/<name>/sweep.md with a plot. Every cell is checked before one starts. Raises SlmError, after all
    have run, that names the cells that failed."""
    try:
        spec = Sweep.model_validate(yaml.safe_load(Path(file).read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, ValidationError) as error:
        raise SlmError(f"{file}: {explain(error)}; a sweep has name, grid and, if need be, profile, stages, settings.") from None
    cells, ready, jobs, failed = spec.cells, {}, {}, {}
    for run_id, cell in cells.items():
        own = spec.settings | cell
        ready[run_id] = settings = load_settings(config, spec.profile, own, run_id)
        runner.select(settings, spec.stages)
        split_of(settings, "train")
        said = [part for key, value in own.items() for part in ("-s", f"{key}={json.dumps(value)}")]
        options = ["--resume", "--profile", spec.profile, "--config", config, "--run-id", run_id, *said]
        jobs[run_id] = (["run", *spec.stages, *options], settings.root, run_id)
    for n, (run_id, problem) in enumerate(_on_ray(jobs, ray, spec) if ray else _here(jobs, spec.workers), 1):
        failed |= {run_id: problem} if problem else {}
        print(f"{n} of {len(jobs)}  {run_id}  {cells[run_id]}  {problem or 'done'}", flush=True)
    points, out = table(spec, ready, failed), settings.path(f"outputs/sweeps/{spec.name}")
    write_text(out / "sweep.md", f"# Sweep {spec.name}\n\n{markdown(points)}\n![score against cost](sweep.png)\n")
    plot(points, out / "sweep.png", settings.cost)
    if failed:
        run_id, problem = next(iter(failed.items()))
        raise SlmError(f"{len(failed)} of {len(jobs)} cells failed, {run_id}: {problem} Mend it and run the sweep again.")
    return points


def run_cell(arguments: list[str], root: Path, run_id: str) -> str:
    """One `python -m slm run` in a process of its own, its output in outputs/runs/<run_id>/sweep.log; returns "" or the
    sentence that says why it failed."""
    log = Path(root, "outputs/runs", run_id, "sweep.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as stream:
        done = subprocess.run([sys.executable, "-m", "slm", *arguments], cwd=root, stdout=stream, stderr=subprocess.STDOUT, check=False)
    said = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("error: ")]
    return "" if done.returncode == 0 else said[-1][7:] if said else f"ended with code {done.returncode}; see {log}."


def _here(jobs: dict[str, tuple], workers: int) -> Iterator[tuple[str, str]]:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    with ThreadPoolExecutor(workers) as pool:  # a thread only waits for its process
        running = {pool.submit(run_cell, *job): run_id for run_id, job in jobs.items()}
        for done in as_completed(running):
            yield running[done], done.result()


def _on_ray(jobs: dict[str, tuple], address: str, spec: Sweep) -> Iterator[tuple[str, str]]:
    import ray

    connect(address, next(iter(jobs.values()))[1], "--ray")
    task = ray.remote(num_cpus=spec.cpus, num_gpus=spec.gpus, max_retries=1)(run_cell)
    running = {task.remote(*job): run_id for run_id, job in jobs.items()}
    while running:
        [done], _ = ray.wait(list(running), num_returns=1)
        try:
            problem = ray.get(done)
        except ray.exceptions.RayError as error:  # its node is gone
            problem = str(error).strip().splitlines()[-1]
        yield running.pop(done), problem


def table(spec: Sweep, ready: dict, failed: dict[str, str]) -> list[dict]:
    """One line per cell without its seed: the settings, how many runs, the primary metric on dev with its interval over
    seeds (one run: over rows), training minutes and money per run; best first, failed ones last."""
    groups: dict[str, list[str]] = {}
    for run_id, cell in spec.cells.items():
        groups.setdefault(json.dumps({k: v for k, v in cell.items() if k != SHORT["seed"]}), []).append(run_id)
    points = []
    for key, runs in groups.items():
        good, found = [run for run in runs if run not in failed], lambda run: load_candidate(ready[run], run)
        results = [r for run in good for r in found(run) if (r.name, r.set) == (NAME, "dev")]
        done = [registry.latest(ready[run], "runs", stage="train", status="completed", run_id=run) or {} for run in good]
        seconds, money = (sum(record.get(name, 0) for record in done) / max(1, len(done)) for name in ("seconds", "cost"))
        points.append({
            **json.loads(key), "runs": len(good), "failed": len(runs) - len(good), "metric": next(iter(results[0].metrics)) if results else "",
            "score": seeds(results) if results else "-", "minutes": round(seconds / 60, 2), "cost": round(money, 4),
        })  # fmt: skip
    return sorted(points, key=lambda p: -p["score"].value if isinstance(p["score"], Metric) else 1)


def plot(points: list[dict], path: Path, rates) -> Path:
    """Score against cost as a PNG, each point with its interval; cost is money, or minutes where no rate is set."""
    from slm.curate.plots import figure, save

    drawn, axes = figure(9, 4)
    by, unit = ("cost", rates.currency) if rates.gpu_hourly_rate else ("minutes", "minutes")
    axes.set(xlabel=f"{unit} per training run", ylabel="no cell has a score", ylim=(0, 1.02))
    for n, p in enumerate(p for p in points if isinstance(p["score"], Metric)):
        name, s = ", ".join(f"{k.rsplit('.', 1)[-1]} {v}" for k, v in p.items() if "." in k), p["score"]
        reach, mark = [[s.value - s.low], [s.high - s.value]], "osD^v"[n // 10 % 5]
        axes.errorbar(p[by], s.value, reach, fmt=mark, capsize=3, label=f"{name} ({p['runs']} runs)".lstrip())
        axes.set_ylabel(f"{p['metric']} on dev")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    if axes.containers:
        drawn.legend(loc="outside right upper", fontsize=8, frameon=False)
    return save(drawn, path)
