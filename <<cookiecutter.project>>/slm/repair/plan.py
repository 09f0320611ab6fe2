"""The repair plan: 20 to 100 targeted rows per cluster, as requests that 03 puts to the teacher."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from slm import registry
from slm.contract import Contract
from slm.errors import SlmError
from slm.generate.plan import Request, label_values
from slm.repair.clusters import Cluster
from slm.report.tables import markdown
from slm.rows import Difficulty, Kind, explain, write_json, write_text

PER_FAILURE = 10  # rows asked for per failure, between the settings' least and most
CELLS = 4  # cells of the failures that a cluster's rows are spread over
NEEDS_TEACHER = (
    "the recorded teacher holds a fixed set of rows and cannot write new rows; set generate.teacher to openai with an "
    "endpoint, or to gguf with a file, or write the plan's rows by hand into data/generated/"
)
CONTRAST = 0.25  # of a cluster's rows show the label it was mistaken for, so that the error does not just turn round


class Cell(BaseModel):
    """Rows of one category, kind and difficulty, with the situation that they must show and the teacher's prompt."""

    model_config = ConfigDict(extra="forbid")
    category: str
    kind: Kind
    difficulty: Difficulty
    rows: int = Field(ge=1)
    situation: str
    prompt: str = ""

    def request(self, cluster: str) -> Request:
        """What is asked of the teacher."""
        return Request(self.category, self.kind, self.difficulty, self.rows, self.situation, cluster)


class Item(BaseModel):
    """One cluster of the plan; `check_first` names a serving fault, and then there are no cells."""

    model_config = ConfigDict(extra="forbid")
    cluster: str
    cause: str
    failures: int
    rows: int
    check_first: str = ""
    cells: list[Cell] = []


class Plan(BaseModel):
    """The repair plan of one run; `later` names clusters that wait because larger ones go first."""

    model_config = ConfigDict(extra="forbid")
    run_id: str
    contract: str
    items: list[Item]
    later: list[str] = []

    @property
    def requests(self) -> list[Request]:
        """What 03 asks the teacher for."""
        return [cell.request(item.cluster) for item in self.items for cell in item.cells]


def make_plan(
    settings, contract: Contract, found: Sequence[Cluster], generation_prompt: Callable | None = None, seeds: Sequence = (),
) -> Plan:  # fmt: skip
    """Rows for the `repair.clusters_max` largest clusters: ten per failure, within the settings' least and most.
    `generation_prompt(contract, request, seed rows)` gives the teacher's text per cell. A systematic serving fault
    gets no rows: data cannot mend it."""
    own, items = settings.repair, []
    if own.rows_per_cluster_min > own.rows_per_cluster_max:
        raise SlmError("repair.rows_per_cluster_min is greater than repair.rows_per_cluster_max; correct project.yaml.")
    mendable = [c for c in found if not c.serving]
    for cluster in [*(c for c in found if c.serving), *mendable[: own.clusters_max]]:
        count = len(cluster.findings)
        wanted = min(max(PER_FAILURE * count, own.rows_per_cluster_min), own.rows_per_cluster_max)
        rows = 0 if cluster.serving else wanted
        cells = _cells(contract, cluster, rows) if rows else []
        for cell in cells if generation_prompt else ():
            shown = [r for r in seeds if r.meta.category == cell.category][:3] or list(seeds[:3])
            cell.prompt = generation_prompt(contract, cell.request(cluster.name), shown)
        about = {"cluster": cluster.name, "cause": cluster.cause, "check_first": cluster.serving}
        items.append(Item(**about, failures=count, rows=rows, cells=cells))
    later = [c.name for c in mendable[own.clusters_max :]]
    return Plan(run_id=settings.run_id, contract=contract.schema_hash, items=items, later=later)


def plan_table(plan: Plan) -> list[dict]:
    """One line per cell; a cluster with a serving fault has one line that says what to check."""
    lines = []
    for item in plan.items:
        if item.check_first:
            none = dict.fromkeys(("category", "kind", "difficulty"), "-")
            lines.append({"cluster": item.cluster, **none, "rows": 0, "situation": f"check first: {item.check_first}"})
        lines += [{"cluster": item.cluster, **c.model_dump(exclude={"prompt"})} for c in item.cells]
    return lines


def save_plan(settings, plan: Plan, causes: Sequence[dict], plot: Path | None = None) -> Path:
    """Write repair_plan.json and repair_plan.md into the run's folder; returns the path of the JSON file."""
    total = sum(item.rows for item in plan.items)
    text = f"# Repair plan, run {plan.run_id}\n\n{total} targeted rows for {sum(bool(i.rows) for i in plan.items)} clusters of "
    text += "failures on dev. No random rows: each cell answers a cluster. No text of an evaluation row stands in a prompt.\n\n"
    text += "## Causes\n\n" + markdown(causes) + (f"\n![causes]({plot.relative_to(settings.run_dir).as_posix()})\n" if plot else "")
    text += "\n## Rows to write\n\n" + markdown(plan_table(plan))
    if plan.later:
        text += "\n## Later\n\nSmaller clusters, after the next run: " + "; ".join(plan.later) + ".\n"
    write_text(settings.run_dir / "repair_plan.md", text)
    counts = {line["cause"]: line["rows"] for line in causes}
    facts = {"stage": "07_repair", "run_id": plan.run_id, "profile": settings.profile, "settings": settings.hash}
    registry.append(settings, "runs", {**facts, "contract": plan.contract, "failures": counts, "rows_planned": total})
    return write_json(settings.run_dir / "repair_plan.json", plan.model_dump())


def from_repair(settings, contract: Contract | None = None) -> list[Request] | None:
    """The requests of the plan that `repair.plan` names, for 03; None when it names none. Raises SlmError when the
    file is missing or broken, belongs to another contract, or the teacher is a recorded one."""
    if not settings.repair.plan:
        return None
    path = settings.path(settings.repair.plan)
    if not path.is_file():
        raise SlmError(f"repair.plan {settings.repair.plan}: there is no such file; run 07_repair first.")
    try:
        plan = Plan.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:  # pydantic's errors are ValueErrors too
        raise SlmError(f"{path}: not a repair plan ({explain(error)}); run 07_repair again.") from None
    if contract is not None and plan.contract != contract.schema_hash:
        raise SlmError(f"{path}: made for another contract; run 06 and 07 again.")
    if settings.generate.teacher == "recorded":
        raise SlmError(f"repair.plan: {NEEDS_TEACHER}.")
    return plan.requests


def next_step(settings, plan: Plan) -> str:
    """What to do with the plan, in one or two sentences."""
    file = f"outputs/runs/{plan.run_id}/repair_plan.json"
    faults = [item.check_first for item in plan.items if item.check_first]
    if faults:
        return f"First mend the serving, no row can: {'; '.join(dict.fromkeys(faults))}."
    if not plan.requests:
        return "Nothing to repair on dev."
    if settings.generate.teacher == "recorded":
        return f"None are made here: {NEEDS_TEACHER}. Then run 03 with -s repair.plan={file}."
    return f"python -m slm run 03-06 --run-id NEXT -s repair.plan={file}"


def _cells(contract: Contract, cluster: Cluster, rows: int) -> list[Cell]:
    """`rows` spread over the cells of the failures by their share, a quarter for the label it is mistaken for."""
    labels = label_values(contract)
    usable = [f for f in cluster.findings if f.label in labels] or list(cluster.findings)
    counts = Counter((f.label if f.label in labels else labels[0], f.kind, f.difficulty) for f in usable).most_common(CELLS)
    confused = cluster.label in labels and cluster.got in labels and cluster.got != cluster.label
    contrast = round(rows * CONTRAST) if confused else 0
    left, whole = rows - contrast, sum(n for _, n in counts)
    shares = [max(1, left * n // whole) for _, n in counts]
    shares[0] += left - sum(shares)
    parts = [(*cell, n, cluster.situation) for (cell, _), n in zip(counts, shares, strict=True)]
    if contrast:
        text = f"looks like {cluster.label} at first sight and is {cluster.got}; the deciding detail is in the text"
        parts.append((cluster.got, "near_miss", "medium", contrast, text))
    return [Cell(category=c, kind=k, difficulty=d, rows=n, situation=text) for c, k, d, n, text in parts]

