"""The plots of 04 as PNG files, and the contradictions side by side."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from slm.curate.coverage import SHORT
from slm.rows import Row

BLUE, RED = "#4878a8", "#c8553d"


def plot_funnel(steps: list[dict], path: Path) -> Path:
    """Horizontal bars, the rows that each gate refused and how many it left, saved as PNG; returns the path."""
    names, lost = [step["gate"] for step in steps], [step["rejected"] for step in steps]
    drawn, axes = figure(8, 0.34 * len(names) + 1.3)
    axes.barh(names, lost, color=RED)
    for place, step in enumerate(steps):
        axes.text(step["rejected"], place, f" {step['rejected']:,} refused, {step['out']:,} left", va="center", fontsize=8)
    axes.invert_yaxis()
    read, kept = (steps[0]["in"], steps[-1]["out"]) if steps else (0, 0)
    axes.set(xlabel="rows refused", xlim=(0, 1.4 * max([1, *lost])), title=f"{read:,} rows read, {kept:,} accepted")
    axes.xaxis.get_major_locator().set_params(integer=True)
    return save(drawn, path)


def heat_map(have, wanted, path: Path) -> Path:
    """The two tables of `coverage.cells`: rows in each cell; a cell with under half of its quota says so in red."""
    drawn, axes = figure(2.5 + 0.8 * have.shape[1], min(60.0, 1.6 + 0.36 * have.shape[0]))
    axes.imshow(have, cmap="Blues", vmin=0, vmax=1.4 * max(1, have.to_numpy().max()), aspect="auto")
    axes.set_xticks(range(have.shape[1]), have.columns, rotation=30, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(range(have.shape[0]), have.index, fontsize=8)
    for i, (_, line) in enumerate(have.iterrows()):
        for j, (rows, quota) in enumerate(zip(line, wanted.iloc[i], strict=True)):
            short = rows < SHORT * quota
            style = {"color": RED, "weight": "bold"} if short else {"color": "black"}
            axes.text(j, i, f"{rows} of {quota:.0f}" if short else rows, ha="center", va="center", fontsize=8, **style)
    axes.set_title("accepted rows; red: under half of what was planned", fontsize=10)
    return save(drawn, path)


def histogram(groups: Mapping[str, Iterable[float]], lines: Mapping[str, float], xlabel: str, path: Path) -> Path:
    """One stacked histogram of several groups of numbers, with named vertical lines (limits, thresholds)."""
    groups = {name: list(values) for name, values in groups.items() if len(values)}
    drawn, axes = figure(8, 3.2)
    if groups:
        axes.hist(groups.values(), bins=40, stacked=True, label=[f"{name} ({len(v):,})" for name, v in groups.items()])
    for n, (name, value) in enumerate(lines.items()):
        axes.axvline(value, color=RED, ls=("-", "--", ":", "-.")[n % 4], lw=1.2, label=f"{name}: {value:g}")
    axes.set(xlabel=xlabel, ylabel="count")
    axes.yaxis.get_major_locator().set_params(integer=True)
    drawn.legend(loc="outside right upper", fontsize=8, frameon=False)
    return save(drawn, path)


def contradictions(records: list[dict], accepted: Iterable[Row], n: int = 5):
    """A table of up to `n` contradictions: two alike messages with their answers, and the field in which they differ.
    `records` are lines of data/rejected."""
    import pandas as pd

    found = [r for r in records if r["gate"] == "label_consistency"]
    pairs = list({frozenset((r["row"]["id"], r["evidence"]["twin"])): r for r in found}.values())[:n]
    twins = {r["evidence"]["twin"] for r in pairs}
    known = {row.id: (row.user, row.answer) for row in accepted if row.id in twins}
    for row in (Row.model_validate(r["row"]) for r in records if "row" in r):
        known[row.id] = (row.user, row.answer)
    lines = [(e["field"], e["similarity"], *known[r["row"]["id"]], *known.get(e["twin"], ("?", "?")))
             for r in pairs for e in [r["evidence"]]]  # fmt: skip
    return pd.DataFrame(lines, columns=["field", "similarity", "message", "answer", "like message", "its answer"])


def figure(width: float, height: float, **panels):
    """An empty figure of so many inches, and its axes (as `Figure.subplots` takes `panels`)."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(width, height), dpi=120, layout="constrained")
    return drawn, drawn.subplots(**panels)


def save(drawn, path: Path) -> Path:
    """The figure as a PNG at `path`."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path)
    return Path(path)
