"""Results as plain records: shown as a table in a notebook, written as Markdown in a report."""

import json
import re
from collections.abc import Sequence

from slm.contract import Contract
from slm.errors import listed
from slm.evaluate.intervals import Metric
from slm.evaluate.metrics import Result
from slm.evaluate.release import Gate
from slm.rows import Row

TITLES = {
    "majority": "majority", "rules": "rule program", "classical": "classical model", "base": "base model",
    "prompted_base": "base, better prompt", "prompted_constrained": "base, better prompt, constrained",
    "rag": "base with retrieval", "larger": "larger model", "fine_tuned": "fine-tuned",
    "fine_tuned_constrained": "fine-tuned, constrained", "f16": "file f16", "q8_0": "file q8_0",
    "q5_k_m": "file q5_k_m", "q4_k_m": "file q4_k_m",
}  # fmt: skip
NUMBER = re.compile(r"[-+<]?\d[^a-zA-Z]*$|-$|not run")  # a cell of a column that stands right
CHEAP = ("majority", "rules", "classical")
BASELINES = tuple(TITLES)[:8]
FILES = tuple(TITLES)[10:]


def title(name: str) -> str:
    """What a model is called in tables and plots."""
    return TITLES.get(name, name)


def markdown(records: Sequence[dict]) -> str:
    """Records with the same keys as a Markdown table; no cell breaks it or loads a picture, numbers stand right."""
    if not records:
        return "(none)\n"
    names = list(records[0])
    cells = [[" ".join(str(r[n]).split()).replace("|", "\\|").replace("![", "!\\[") for n in names] for r in records]
    right = [all(map(NUMBER.match, column)) for column in zip(*cells, strict=True)]
    head, *body = (f"| {' | '.join(line)} |" for line in (names, *cells))
    return "\n".join([head, f"|{'|'.join('---:' if r else '---' for r in right)}|", *body]) + "\n"


def frame(records: Sequence[dict]):
    """Records as a pandas DataFrame that shows whole texts."""
    import pandas

    pandas.set_option("display.max_colwidth", 120)
    return pandas.DataFrame(list(records))


def metric(found: Metric | dict | None) -> str:
    """ "0.853 [0.801, 0.902]"; "-" or "not run: why" for what was not measured."""
    if found is None:
        return "-"
    if isinstance(found, Metric):
        return str(found)
    if "not_run" in found:
        return f"not run: {found['not_run']}"
    return "{value:.3f} [{low:.3f}, {high:.3f}]".format(**found)


def sets(found: dict[str, list[Row]], locked: dict[str, str]) -> list[dict]:
    """One line per evaluation set: rows, what they cover, the hash it is locked by."""
    titles = {"categories": "category", "kinds": "kind", "languages": "language", "groups": "group"}
    return [
        {"set": name, "rows": len(rows), **{t: len({getattr(r.meta, key) for r in rows}) for t, key in titles.items()},
         "locked": locked[name][:12]} for name, rows in found.items()
    ]  # fmt: skip


def results(found: Sequence[Result], names: Sequence[str]) -> list[dict]:
    """One line per model: the first of the named metrics with its interval, what a lone request takes, the other
    metrics; or why it was not run. A column that holds nothing for any model is left out."""
    lines = []
    for r in found:
        cells = {n: metric(r.metrics.get(n)) for n in names}
        waits = [number(v, 1000) for v in (r.latency_p50_s, r.latency_p95_s, r.latency_p99_s)]
        cost = r.cost_per_1k_requests
        lines.append({
            "model": title(r.name), "constrained": ("yes" if r.constrained else "no") if r.ran else "-",
            names[0]: cells[names[0]], "n": str(len(r.scores)) if r.ran else "-",
            "latency p50 / p95 / p99 (ms)": " / ".join(waits) if any(w != "-" for w in waits) else "-",
            "first token (ms)": number(r.first_token_s, 1000), "tokens/s": number(r.tokens_per_second),
            "memory (MB)": number(r.memory_mb), "cost per 1,000": "-" if cost is None else f"{cost:.4f}",
            "error rate": metric(r.metrics.get("error_rate")), **cells, "note": r.reason and f"not run: {r.reason}",
        })  # fmt: skip
    return [{k: v for k, v in line.items() if any(one[k] not in ("", "-") for one in lines)} for line in lines]


def comparisons(found: dict[str, dict]) -> list[dict]:
    """One line per baseline: difference with interval, McNemar's p, rows fixed and broken, verdict."""
    return [
        {
            "against": title(name),
            "difference": "{value:+.3f} [{low:+.3f}, {high:+.3f}]".format(**c["difference"]),
            "McNemar p": f"{c['mcnemar_p']:.4f}" if c["mcnemar_p"] >= 1e-4 else "<0.0001",
            "rows fixed": len(c["fixed"]), "rows broken": len(c["broken"]),
            "n": c["difference"]["n"], "verdict": c["verdict"],
        }
        for name, c in found.items()
    ]  # fmt: skip


def gates(found: Sequence[Gate]) -> list[dict]:
    """One line per release gate; of the rows that failed it the first ten."""
    return [
        {"gate": g.name, "rule": g.rule, "measured": g.measured, "status": g.status, "note": g.note,
         "rows": listed(g.rows, 10) if g.status == "fail" else ""} for g in found
    ]  # fmt: skip


def failures(found: Sequence[dict], count: int = 10) -> list[dict]:
    """The worst failed rows: what came in, what was answered, what was wrong with it."""
    return [
        {
            "set": f["set"], "row": f["row_id"], "input": shorten(f["user"], 80), "answer": shorten(f["text"], 60),
            "wrong": shorten(f["explanation"], 100),
        }
        for f in found[:count]
    ]  # fmt: skip


def side_by_side(failure: dict) -> list[dict]:
    """One line per field of a failed row: expected and given; a cross marks what was judged wrong."""
    want, got = (Contract.flatten(failure[key]) for key in ("expected", "given"))
    given = got if failure["given"] is not None else dict.fromkeys(want, "(unreadable)")

    def cell(value) -> str:
        return shorten(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), 400)

    return [
        {"": "✗" * (n in failure["wrong"]), "field": n, "expected": cell(want.get(n)), "given": cell(given.get(n))}
        for n in dict.fromkeys([*want, *got])
    ]


def number(value: float | None, scale: float = 1) -> str:
    """Two digits below 100, whole numbers above; "-" for what was not measured."""
    if value is None:
        return "-"
    value *= scale
    return "<0.1" if 0 < value < 0.1 else f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def shorten(text: str, length: int) -> str:
    """One line of at most `length` characters."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"


def seconds(value: float) -> str:
    """A duration in ms below one second, else in s."""
    return f"{value * 1000:.1f} ms" if value < 1 else f"{value:.2f} s"
