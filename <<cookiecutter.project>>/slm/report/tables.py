"""Results as plain records: shown as a table in a notebook, written as Markdown in a report."""

from collections.abc import Sequence

from slm.evaluate.metrics import Metric, Result
from slm.evaluate.release import Gate
from slm.rows import Row

TITLES = {
    "majority": "majority", "rules": "rule program", "classical": "classical model", "base": "base model",
    "prompted_base": "base, better prompt", "prompted_constrained": "base, better prompt, constrained",
    "rag": "base with retrieval", "larger": "larger model", "fine_tuned": "fine-tuned",
    "fine_tuned_constrained": "fine-tuned, constrained", "f16": "file f16", "q8_0": "file q8_0",
    "q5_k_m": "file q5_k_m", "q4_k_m": "file q4_k_m",
}  # fmt: skip


def markdown(records: Sequence[dict]) -> str:
    """Records with the same keys as a Markdown table; cells never break it."""
    if not records:
        return "(none)\n"
    names = list(records[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for record in records:
        cells = (" ".join(str(record[n]).split()).replace("|", "\\|") for n in names)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def frame(records: Sequence[dict]):
    """Records as a pandas DataFrame that shows whole texts."""
    import pandas

    pandas.set_option("display.max_colwidth", 120)
    return pandas.DataFrame(list(records))


def metric(found: Metric | dict | None) -> str:
    """ "0.853 [0.801, 0.902]", or "-" for what was not measured."""
    if found is None:
        return "-"
    return str(found if isinstance(found, Metric) else Metric.model_validate(found))


def sets(found: dict[str, list[Row]], locked: dict[str, str]) -> list[dict]:
    """One line per evaluation set: rows, what they cover, the hash it is locked by."""
    titles = {"categories": "category", "kinds": "kind", "languages": "language", "groups": "group"}
    return [
        {"set": name, "rows": len(rows), **{t: len({getattr(r.meta, key) for r in rows}) for t, key in titles.items()},
         "locked": locked[name][:12]} for name, rows in found.items()
    ]  # fmt: skip


def results(found: Sequence[Result], names: Sequence[str]) -> list[dict]:
    """One line per model: the named metrics with intervals, n, latency; or why it was not run."""
    lines = []
    for r in found:
        cells = {n: metric(r.metrics.get(n)) for n in names}
        wait = "-" if r.latency_p50_s is None else seconds(r.latency_p50_s)
        facts = {"n": len(r.scores) if r.ran else "-", "latency p50": wait, "note": r.reason and f"not run: {r.reason}"}
        lines.append({"model": TITLES.get(r.name, r.name), **cells, **facts})
    return lines


def comparisons(found: dict[str, dict]) -> list[dict]:
    """One line per baseline: difference with interval, McNemar's p, rows fixed and broken, verdict."""
    return [
        {
            "against": TITLES.get(name, name),
            "difference": "{value:+.3f} [{low:+.3f}, {high:+.3f}]".format(**c["difference"]),
            "McNemar p": f"{c['mcnemar_p']:.4f}", "rows fixed": len(c["fixed"]), "rows broken": len(c["broken"]),
            "n": c["difference"]["n"], "verdict": c["verdict"],
        }
        for name, c in found.items()
    ]  # fmt: skip


def gates(found: Sequence[Gate]) -> list[dict]:
    """One line per release gate."""
    return [{"gate": g.rule, "measured": g.measured, "status": g.status, "note": g.note} for g in found]


def failures(found: Sequence[dict], count: int = 10) -> list[dict]:
    """The first failed rows: what came in, what was answered, what was wrong with it."""
    return [
        {
            "set": f["set"], "row": f["row_id"], "input": shorten(f["user"], 80), "answer": shorten(f["text"], 60),
            "wrong": shorten(f["explanation"], 100),
        }
        for f in found[:count]
    ]  # fmt: skip


def shorten(text: str, length: int) -> str:
    """One line of at most `length` characters."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"


def seconds(value: float) -> str:
    """A duration in ms below one second, else in s."""
    return f"{value * 1000:.1f} ms" if value < 1 else f"{value:.2f} s"
