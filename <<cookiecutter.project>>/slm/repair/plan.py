"""The repair plan: 20 to 100 targeted rows per cluster, as requests that 03 puts to the teacher."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from slm import registry
from slm.contract import Contract
from slm.errors import SlmError
from slm.evaluate.scorers import Score
from slm.generate.plan import Request, label_values
from slm.repair.causes import diagnose
from slm.repair.clusters import Cell, Cluster
from slm.report.tables import markdown
from slm.rows import Row, explain, write_json, write_text

PER_FAILURE = 10  # rows asked for per failure, between the settings' least and most
CELLS = 4  # cells of the failures that a cluster's rows are spread over
NEEDS_TEACHER = (
    "the recorded teacher holds a fixed set of rows and cannot write new rows; set generate.teacher to openai with an "
    "endpoint, or to gguf with a file, or write the plan's rows by hand into data/generated/"
)
CONTRAST = 0.25  # of a cluster's rows show the label it was mistaken for, so that the error does not just turn round


class Item(Cluster):
    """One cluster of the plan with the rows to write; a serving fault (`check_first`) gets none."""

    rows: int
    cells: list[Cell] = []


class Plan(BaseModel):
    """The repair plan of one run; `later` names clusters that wait because larger ones go first, `tried` those whose
    round has not helped."""

    model_config = ConfigDict(extra="forbid")
    run_id: str
    contract: str
    items: list[Item]
    later: list[str] = []
    tried: list[str] = []

    @property
    def requests(self) -> list[Request]:
        """What 03 asks the teacher for."""
        return [request(item, cell) for item in self.items for cell in item.cells]


def request(cluster: Cluster, cell: Cell) -> Request:
    """What is asked of the teacher for a cell."""
    return Request(cell.category, cell.kind, cell.difficulty, cell.rows, cell.situation, cluster.name)


def make_plan(
    settings, contract: Contract, found: Sequence[Cluster], generation_prompt: Callable | None = None, seeds: Sequence = (),
) -> Plan:  # fmt: skip
    """Rows for the `repair.clusters_max` largest clusters, the data's faults first: ten per failure, within the settings'
    least and most. `generation_prompt(contract, request, seed rows)` gives the teacher's text per cell. A systematic
    serving fault gets no rows; neither does a cluster whose round did not help this run."""
    own, items = settings.repair, []
    if own.rows_per_cluster_min > own.rows_per_cluster_max:
        raise SlmError("repair.rows_per_cluster_min is greater than repair.rows_per_cluster_max; correct project.yaml.")
    lost = [r for r in registry.read(settings, "runs") if r["stage"] == "repair" and r["status"] == "discarded"]
    tried = {name for r in lost if r["parents"]["run"] == settings.run_id for name in r["clusters"]}
    mendable = sorted((c for c in found if not c.check_first and c.name not in tried), key=lambda c: c.blame != "data")
    for cluster in [*(c for c in found if c.check_first), *mendable[: own.clusters_max]]:
        wanted = min(max(PER_FAILURE * len(cluster.findings), own.rows_per_cluster_min), own.rows_per_cluster_max)
        rows = 0 if cluster.check_first else wanted
        cells = _cells(contract, cluster, rows) if rows else []
        for cell in cells if generation_prompt else ():
            shown = [r for r in seeds if r.meta.category == cell.category][:3] or list(seeds[:3])
            cell.prompt = generation_prompt(contract, request(cluster, cell), shown)
        items.append(Item(**cluster.model_dump(), rows=rows, cells=cells))
    later = [c.name for c in mendable[own.clusters_max :]]
    again = [c.name for c in found if c.name in tried]
    return Plan(run_id=settings.run_id, contract=contract.schema_hash, items=items, later=later, tried=again)


def plan_table(plan: Plan) -> list[dict]:
    """One line per cell; a cluster with a serving fault has one line that says what to check."""
    lines = []
    for item in plan.items:
        if item.check_first:
            none = dict.fromkeys(("category", "kind", "difficulty"), "-")
            lines.append({"cluster": item.name, **none, "rows": 0, "situation": f"check first: {item.check_first}"})
        names = ("category", "kind", "difficulty", "rows", "situation")
        lines += [{"cluster": item.name, **{name: getattr(c, name) for name in names}} for c in item.cells]
    return lines


def save_plan(
    settings, plan: Plan, causes: Sequence[dict], plot: Path | None = None, found: Sequence = (), rows: Sequence = (),
) -> Path:  # fmt: skip
    """Write repair_plan.json and repair_plan.md into the run's folder; returns the path of the JSON file. `causes`,
    `found` and `rows` are the tables of the causes, the clusters and the failed rows behind them."""
    total = sum(item.rows for item in plan.items)
    text = f"# Repair plan, run {plan.run_id}\n\n{total} targeted rows for {sum(bool(i.rows) for i in plan.items)} clusters of "
    text += "failures on dev. No random rows: each cell answers a cluster; its prompt, without a word of an evaluation row, "
    text += f"stands in repair_plan.json.\n\n**Next:** {next_step(settings, plan)}\n\n## Causes\n\n{markdown(causes)}"
    text += f"\n![causes]({plot.relative_to(settings.run_dir).as_posix()})\n" if plot else ""
    text += f"\n## Clusters\n\n{markdown(found)}\n## Rows to write\n\n{markdown(plan_table(plan))}"
    for title, names in (("Later, after the next run", plan.later), ("Tried in a round that did not help", plan.tried)):
        text += f"\n{title}: {'; '.join(names)}.\n" if names else ""
    against = [{"cluster": i.name, **c} for i in plan.items for c in i.contradictions]
    text += f"\n## Training rows that may teach the opposite\n\n{markdown(against)}\n## Failed rows\n\n{markdown(rows)}"
    write_text(settings.run_dir / "repair_plan.md", text)
    facts = {"stage": "07_repair", "run_id": plan.run_id, "profile": settings.profile, "settings": settings.hash}
    facts |= {"contract": plan.contract, "failures": {c["cause"]: c["rows"] for c in causes}, "rows_planned": total}
    registry.append(settings, "runs", facts)
    return write_json(settings.run_dir / "repair_plan.json", plan.model_dump())


def from_repair(settings, contract: Contract | None = None) -> list[Request] | None:
    """The requests of the plan that `repair.plan` names, for 03; None when it names none. Raises SlmError as
    `read_plan` does, or when the teacher is a recorded one."""
    if not settings.repair.plan:
        return None
    plan = read_plan(settings, settings.repair.plan, contract)
    if settings.generate.teacher == "recorded":
        raise SlmError(f"repair.plan: {NEEDS_TEACHER}.")
    return plan.requests


def read_plan(settings, file: str, contract: Contract | None = None) -> Plan:
    """The plan in a file of the project. Raises SlmError when it is missing, broken or of another contract."""
    path = settings.path(file)
    if not path.is_file():
        raise SlmError(f"repair.plan {file}: there is no such file; run 07_repair first.")
    try:
        plan = Plan.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:  # pydantic's errors are ValueErrors too
        raise SlmError(f"{path}: not a repair plan ({explain(error)}); run 07_repair again.") from None
    if contract is not None and plan.contract != contract.schema_hash:
        raise SlmError(f"{path}: made for another contract; run 06 and 07 again.")
    return plan


def same_failures(settings, contract: Contract, pairs: Sequence[tuple[Row, Score]]) -> list[Row]:
    """Of failed training rows those that fail as the clusters of `repair.plan` do; all of them when none does."""
    wanted = [(item.cause, item.label) for item in read_plan(settings, settings.repair.plan, contract).items]
    rows, alike = [row for row, _ in pairs], {
        f.row_id for f in diagnose(pairs, contract)
        if any(f.cause == cause and label in ("", f.label) for cause, label in wanted)
    }
    print(f"{len(alike)} of {len(rows)} failures are those of the repair plan{'' if alike else ': all are taken'}")
    return [row for row in rows if row.id in alike] or list(rows)


def next_step(settings, plan: Plan) -> str:
    """What to do with the plan, in one or two sentences."""
    faults = [item.check_first for item in plan.items if item.check_first]
    if faults:
        return f"First mend the serving, no row can: {'; '.join(dict.fromkeys(faults))}."
    if not plan.requests:
        return "Nothing to repair on dev" + (", each cluster was tried." if plan.tried else ".")
    against = sum(len(item.contradictions) for item in plan.items)
    first = f"First look at the training rows that may teach the opposite: {against} (curate decide). " if against else ""
    if settings.generate.teacher == "recorded":
        return f"{first}No rows are made here: {NEEDS_TEACHER}. Then python -m slm repair {plan.run_id} --apply."
    return f"{first}python -m slm repair {plan.run_id} --apply"


def _cells(contract: Contract, cluster: Cluster, rows: int) -> list[Cell]:
    """`rows` spread over the situations and over the cells of the failures by their share, a quarter of them for the
    label that it is mistaken for."""
    labels, told = label_values(contract), cluster.situations
    where = ((f.label if f.label in labels else labels[0], f.kind, f.difficulty) for f in cluster.findings)
    counts = Counter(where).most_common(CELLS)
    confused = cluster.label in labels and cluster.got in labels and cluster.got != cluster.label
    left = rows - (contrast := round(rows * CONTRAST) if confused else 0)
    slots = [(*counts[n % len(counts)], told[n % len(told)]) for n in range(min(left, max(len(counts), len(told))))]
    shares = [max(1, left * weight // sum(w for _, w, _ in slots)) for _, weight, _ in slots]
    shares[0] += left - sum(shares)
    cells = [
        Cell(situation=s.situation, category=s.category if s.category in labels else cell[0], kind=s.kind or cell[1],
             difficulty=s.difficulty or cell[2], rows=n) for (cell, _, s), n in zip(slots, shares, strict=True)
    ]  # fmt: skip
    if contrast:
        text = f"looks like {cluster.label} at first sight and is {cluster.got}; the deciding detail is in the text"
        cells.append(Cell(situation=text, category=cluster.got, kind="near_miss", difficulty="medium", rows=contrast))
    return cells
