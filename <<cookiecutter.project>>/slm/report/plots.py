"""Plots as PNG files: bars with intervals, slices, confusion, reliability. Nothing is shown, only written."""

from collections.abc import Sequence
from pathlib import Path

from slm.curate.plots import figure, save
from slm.evaluate.intervals import Metric
from slm.evaluate.metrics import Result
from slm.report.tables import FILES, title

BLUE, GREY = "#2b6cb0", "#a0aec0"


def _middle(label: str, length: int) -> str:
    """A label of at most `length` characters; long ones often differ at their end, so the middle is left out."""
    return label if len(label) <= length else f"{label[: length // 2]}…{label[1 + length // 2 - length :]}"


def _bars(axes, names: list[str], metrics: Sequence[Metric], colors: list[str]) -> None:
    reach = [[max(0, m.value - m.low) for m in metrics], [max(0, m.high - m.value) for m in metrics]]
    ends = {"capsize": 3, "lw": 1, "ecolor": "#2d3748"}
    bars = axes.barh(range(len(names)), [m.value for m in metrics], color=colors, xerr=reach, error_kw=ends)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.19)
    axes.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    behind = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    axes.bar_label(bars, fmt="%.3f", padding=5, fontsize=8, bbox=behind, zorder=5)
    axes.spines[["top", "right"]].set_visible(False)


def models_bar(results: Sequence[Result], name: str, path: Path, target: float) -> Path:
    """One bar per model that ran: metric `name` with its interval, the target as a line. Blue: what was trained here;
    hatched: decoding held to the schema."""
    ran = [r for r in results if r.ran and name in r.metrics]
    drawn, axes = figure(7.5, 1.5 + 0.42 * len(ran))
    own = [r.name.startswith("fine_tuned") or r.name in FILES for r in ran]
    names, colors = [_middle(title(r.name), 34) for r in ran], [BLUE if o else GREY for o in own]
    _bars(axes, names, [r.metrics[name] for r in ran], colors)
    held = [bar for bar, r in zip(axes.patches, ran, strict=True) if r.constrained]
    for bar in held:
        bar.set(hatch="///", edgecolor="white")
    if held:
        held[0].set_label("decoding held to the schema")
    axes.axvline(target, color="#c53030", ls="--", lw=1, label=f"target {target:g}")
    drawn.legend(loc="outside lower right", ncols=2, fontsize=8, frameon=False)
    axes.set_xlabel(f"{name} (mean over rows, 0 to 1; lines: interval)", fontsize=9)
    axes.set_ylabel("model", fontsize=9)
    axes.margins(y=0.02)
    axes.set_title(f"{name} on {ran[0].set}, n = {len(ran[0].scores)}" if ran else name, fontsize=11)
    return save(drawn, path)


def slices(result: Result, name: str, path: Path) -> Path:
    """Four panels: the row value by category, kind, difficulty and language, with intervals and n."""
    keys = list(result.slices)
    heights = [len(result.slices[k]) + 1.2 for k in keys]
    drawn, panels = figure(7, 0.5 + 0.3 * sum(heights), nrows=len(keys), height_ratios=heights, squeeze=False)
    for axes, key in zip(panels[:, 0], keys, strict=True):
        found = result.slices[key]
        names = [f"{_middle(n, 26)} (n={m.n})" for n, m in found.items()]
        _bars(axes, names, list(found.values()), [BLUE] * len(found))
        axes.set_ylabel(key, fontsize=9)
        axes.tick_params(labelsize=8)
    drawn.align_ylabels()
    axes.set_xlabel(f"{name} (mean over rows, 0 to 1; lines: interval)", fontsize=9)
    drawn.suptitle(f"{title(result.name)} on {result.set}: {name} by slice", fontsize=11)
    return save(drawn, path)


def confusion(result: Result, path: Path) -> Path:
    """Expected labels down, given labels across, counts in the cells."""
    import numpy as np
    from sklearn.metrics import ConfusionMatrixDisplay

    names = [_middle(name, 22) for name in result.confusion["labels"]]
    size = 2.6 + 0.46 * len(names)
    drawn, axes = figure(size + 0.6, size)
    shown = ConfusionMatrixDisplay(np.array(result.confusion["counts"]), display_labels=names)
    shown.plot(ax=axes, cmap="Blues", values_format="d", text_kw={"fontsize": 8}, im_kw={"vmin": 0}, colorbar=False)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set(xlabel="given label", ylabel="expected label")
    axes.set_title(f"{title(result.name)}\non {result.set}, number of rows", fontsize=10)
    drawn.colorbar(shown.im_, ax=axes, label="rows", shrink=0.7)
    return save(drawn, path)


def reliability(result: Result, path: Path) -> Path:
    """Share of right labels against the model's own confidence, bin by bin, and how many rows each bin holds."""
    found = result.calibration
    bins = [b for b in found["bins"] if b["n"]]
    drawn, (top, below) = figure(5.4, 5.6, nrows=2, sharex=True, height_ratios=[3, 1])
    middle, width = [(b["low"] + b["high"]) / 2 for b in bins], [0.9 * (b["high"] - b["low"]) for b in bins]
    sure, right = [b["confidence"] for b in bins], [b["accuracy"] for b in bins]
    top.plot([0, 1], [0, 1], color="#2d3748", ls="--", lw=1, label="perfectly calibrated")
    top.bar(middle, right, width, color=GREY, label="share right in the bin")
    top.plot(sure, right, "o", color=BLUE, label="at its mean confidence")
    top.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="share of right labels (0 to 1)")
    drawn.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    below.bar_label(below.bar(middle, [b["n"] for b in bins], width, color=BLUE), padding=2, fontsize=8)
    below.margins(y=0.3)
    below.set(xlabel="confidence in the label (probability, 0 to 1)", ylabel="rows")
    for axes in (top, below):
        axes.spines[["top", "right"]].set_visible(False)
    text = f"{title(result.name)} on {result.set}, n = {found['n']}: ECE {found['ece']:.3f}, Brier {found['brier']:.3f}"
    drawn.suptitle(text, fontsize=10)
    return save(drawn, path)


def monitor(found: dict, measures: Sequence[str], path: Path) -> Path:
    """Four panels over the windows of a log (slm.production.monitor): three measures by model version, and the
    distances from the reference; limits dashed."""
    from datetime import datetime, timedelta

    (drawn, panels), windows = figure(10, 6.4, nrows=2, ncols=2), found["windows"][::-1]
    ends = sorted(datetime.fromisoformat(window[end]) for window in windows for end in ("from", "to"))
    limits = [{line["limit"] for line in found["lines"] if line["measure"] == name} for name in measures]
    models = list(dict.fromkeys(model for window in windows for model in window["models"]))[-6:]
    distances = list(dict.fromkeys(name for window in windows for name in window["drift"]))
    traces = [[(m, [w["models"].get(m, {}).get(name) for w in windows]) for m in models] for name in measures]
    traces.append([(name, [w["drift"].get(name) for w in windows]) for name in distances])
    units = (*measures[:2], f"{measures[2]} ({found['currency']})", "distance from the reference (0 to 1)")
    for axes, lines, unit, bounds in zip(panels.ravel(), traces, units, (*limits, {found["limit"]}), strict=True):
        for n, (name, line) in enumerate(lines):
            known = [(datetime.fromisoformat(w["to"]), p) for w, p in zip(windows, line, strict=True) if p]
            values = [p["value"] for _, p in known]
            reach = [[v - p.get("low", v) for (_, p), v in zip(known, values, strict=True)],
                     [p.get("high", v) - v for (_, p), v in zip(known, values, strict=True)]]  # fmt: skip
            look = {"fmt": "o-", "ms": 4, "lw": 1.2, "capsize": 3, "color": (BLUE, "#c05621", GREY, "#2f855a", "#805ad5", "#2d3748")[n]}
            axes.errorbar([day for day, _ in known], values, reach if known else None, label=_middle(name, 30), **look)
        for n, bound in enumerate(sorted(bounds)):
            axes.axhline(bound, color="#c53030", ls="--", lw=1, label=None if n else "limit")
        axes.set_ylim(bottom=0)
        axes.set_xlim(ends[0], ends[-1] + timedelta(days=1))
        axes.set_ylabel(unit, fontsize=9)
        axes.tick_params(axis="x", rotation=30, labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=7, frameon=False)
    drawn.suptitle(f"Requests from {windows[0]['from'][:10]} to {windows[-1]['to'][:10]}, by window", fontsize=11)
    return save(drawn, path)


def break_even(found: dict, path: Path) -> Path:
    """When the fine-tune has paid for itself, over requests per month (across) and the price that the alternative takes
    per million tokens (up). `found`: see `slm.report.economy`."""
    import numpy as np
    from matplotlib.colors import ListedColormap

    own, other, here = found["own"], found["other"], max(1, found["requests"])
    price = 1e6 * (other["per request"] or 1e-6 * other["tokens per request"]) / other["tokens per request"]
    across, up = (middle * np.logspace(-2, 2, 161) for middle in (here, price))
    requests, prices = np.meshgrid(across, up)
    saved = requests * (other["tokens per request"] * prices / 1e6 - own["per request"])
    gain = saved - found["hosting"] - (found["maintenance"] or 0)
    months = np.where(gain > 0, found["spent"] / np.maximum(gain, 1e-9), np.inf)
    shades = {"within a month": "#1c4f82", "within 3 months": BLUE, "within a year": "#6ba3d6",
              "within 3 years": "#a9cbe8", "later": "#dbe9f5", "never": GREY}  # fmt: skip
    drawn, axes = figure(7, 4.4)
    axes.set(xscale="log", yscale="log", xlabel="requests per month")
    area = np.digitize(months, [1, 3, 12, 36, 1e9], right=True)
    axes.pcolormesh(requests, prices, area, cmap=ListedColormap(list(shades.values())), vmin=-0.5, vmax=5.5)
    for name, shade in shades.items():
        axes.plot([], [], "s", color=shade, label=name)
    if other["per request"]:
        axes.plot(here, price, "o", color="#c53030", mec="white", ms=9, label="this project")
    axes.set_ylabel(f"price of the alternative, {found['currency']} per 1M tokens")
    drawn.legend(loc="outside right upper", fontsize=8, frameon=False, title="paid back")
    upkeep = "not said, taken as 0" if found["maintenance"] is None else f"{found['maintenance']:,.0f} a month"
    axes.set_title(f"{found['spent']:,.2f} {found['currency']} spent, maintenance {upkeep}", fontsize=10)
    return save(drawn, path)
