"""The funnel: how many rows went into each gate, and how many it kept back."""

from pathlib import Path


def plot_funnel(steps: list[dict], path: Path) -> Path:
    """Horizontal bars, rows left after each gate, saved as PNG; returns the path."""
    from matplotlib.figure import Figure

    names = ["read", *(step["gate"] for step in steps)]
    left = [steps[0]["in"] if steps else 0, *(step["out"] for step in steps)]
    lost = [0, *(step["rejected"] for step in steps)]
    figure = Figure(figsize=(8, 0.34 * len(names) + 1), layout="constrained")
    axes = figure.subplots()
    axes.barh(names, left, color="#4878a8", label="kept")
    axes.barh(names, lost, left=left, color="#c8553d", label="rejected")
    for place, (kept, gone) in enumerate(zip(left, lost, strict=True)):
        axes.text(kept + gone, place, f" {kept}" + (f" (-{gone})" if gone else ""), va="center", fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("rows")
    axes.set_xlim(0, 1.15 * max(1, *left))
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize=8, frameon=False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return Path(path)
