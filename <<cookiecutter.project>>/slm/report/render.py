"""Templates filled in (slm/report/templates), and the evaluation report as Markdown, the verdict first."""

import re
from pathlib import Path

from slm.contract import Contract
from slm.evaluate.candidate import NAME
from slm.evaluate.metrics import Result
from slm.evaluate.release import Gate
from slm.report import economy, tables
from slm.train.callbacks import FORGOTTEN

LINES = (
    "base_model_score", "prompted_base_score", "fine_tuned_model_score", "larger_model_score", "latency",
    "tokens_per_second", "cost_per_1k_requests", "schema_error_rate", "failure_examples",
)  # fmt: skip
TIMED = (
    "latency_p50_s", "latency_p95_s", "latency_p99_s", "first_token_s", "tokens_per_second", "memory_mb",
    "cost_per_1k_requests",
)  # fmt: skip
WORST = 15  # failed rows shown side by side


def fill(template: str, **values) -> str:
    """A file of slm/report/templates with its values. Raises jinja2.UndefinedError for a place that nothing fills."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = FileSystemLoader(Path(__file__).with_name("templates"))
    made = Environment(loader=folder, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    made.filters |= {
        "block": block, "comparisons": tables.comparisons, "metric": tables.metric, "side_by_side": tables.side_by_side,
        "months": economy.months, "shorten": tables.shorten,
        "counted": lambda counts: ", ".join(f"{name} {n}" for name, n in counts.items()),
        "table": lambda records: tables.markdown(records).rstrip("\n"), "title": tables.title,
    }  # fmt: skip
    return made.get_template(template).render(**values).rstrip("\n") + "\n"


def block(text: str) -> str:
    """A text as a code block that none of its own backticks can end."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def table(found: dict[str, dict[str, Result]], set: str) -> list[Result]:
    """The models of one set in the order of the titles. Nothing is timed on test: its figures come from dev."""
    order = [k for k in tables.TITLES if k in found[set]] + [k for k in found[set] if k not in tables.TITLES]
    timed = found["dev"] if set == "test" else found[set]
    return [found[set][k].model_copy(update={f: getattr(timed.get(k, found[set][k]), f) for f in TIMED}) for k in order]


def render(settings, contract: Contract, report: dict, found: dict, pictures: dict[str, Path]) -> str:
    """The report as Markdown. Of test rows the ids alone are shown."""
    from slm.report.baselines import columns, fields

    head, own = report["headline_set"], [Gate.model_validate(gate) for gate in report["gates"]]
    left = sum(g.status != "pass" for g in own)
    cheap, seen = report["strongest_cheap"], report["sets"]
    measured = {set: by_name[NAME]["metrics"] for set, by_name in report["results"].items()}
    names = dict.fromkeys(n for metrics in measured.values() for n in metrics if not n.startswith("field."))
    return fill(
        "eval_report.md", contract=contract, report=report, head=head, confidence=f"{settings.evaluate.confidence:.0%}",
        state=f"{left} of {len(own)} release gates not passed" if left else "every release gate passed",
        currency=settings.cost.currency, nine=nine(report, settings), differences=differences, gates=tables.gates(own),
        models=lambda set: tables.results(table(found, set), columns(contract)), fields=fields(table(found, head)),
        every=[{"metric": n, **{s: tables.metric(m.get(n)) for s, m in measured.items()}} for n in names],
        cheap=tables.comparisons({cheap: report["comparisons"][head][cheap]})[0] if cheap else None,
        forgotten=FORGOTTEN, judged=report["comparisons"][head][report["strongest"]]["preference"],
        shown=[f for f in report["failures"] if f["set"] != "test"][:WORST],
        hidden=[f["row_id"] for f in report["failures"] if f["set"] == "test"],
        sets=[{"set": n, "rows": s["n"], "hash": s["hash"][:12], "looks": s["looks"]} for n, s in seen.items()],
        pictures={title: path.name for title, path in pictures.items()},
    )  # fmt: skip


def differences(report: dict, set: str | None = None) -> list[dict]:
    """Fine-tuned minus each baseline, on one set or on all."""
    return [
        {**({} if set else {"set": name}), **line}
        for name, pairs in report["comparisons"].items() if set in (None, name) for line in tables.comparisons(pairs)
    ]  # fmt: skip


def nine(report: dict, settings) -> list[dict]:
    """The nine lines that every report carries, as a table."""
    lines, cells = report["lines"], {}
    for key in LINES[:4]:
        cells[key] = f"not run: {lines[key]['not_run']}" if "not_run" in lines[key] else tables.metric(lines[key])
    wait, speed, cost = lines["latency"], lines["tokens_per_second"], lines["cost_per_1k_requests"]
    waits = ", ".join(f"{p[:3]} {tables.seconds(w)}" for p, w in wait.items() if w is not None)
    cells["latency"] = f"{waits}, one request at a time" if waits else "not measured"
    cells["tokens_per_second"] = f"{speed:.1f}" if speed else "-"
    money = "no rates set in project.yaml" if cost is None else f"{cost:.4f} {settings.cost.currency}"
    cells["cost_per_1k_requests"] = money
    cells["schema_error_rate"] = tables.metric(lines["schema_error_rate"])
    cells["failure_examples"] = f"{len(lines['failure_examples'])} shown below"
    return [{"line": key, f"on {report['headline_set']}": value} for key, value in cells.items()]
