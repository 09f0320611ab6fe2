"""The plots of 04 as PNG files, and the contradictions side by side."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from slm.curate.coverage import SHORT
from slm.rows import Row

BLUE, RED = "#4878a8", "#c8553d"


def plot_funnel(steps: list[dict], path: Path) -> Path:
    """Horizontal bars, rows left after each gate, saved as PNG; returns the path."""
    names, left = ["read", *(s["gate"] for s in steps)], [steps[0]["in"] if steps else 0, *(s["out"] for s in steps)]
    lost = [0, *(step["rejected"] for step in steps)]
    drawn, axes = figure(8, 0.34 * len(names) + 1)
    axes.barh(names, left, color=BLUE, label="kept")
    axes.barh(names, lost, left=left, color=RED, label="rejected")
    for place, (kept, gone) in enumerate(zip(left, lost, strict=True)):
        axes.text(kept + gone, place, f" {kept:,}" + (f" (-{gone:,})" if gone else ""), va="center", fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="rows", xlim=(0, 1.15 * max(1, *left)))
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize=8, frameon=False)
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
