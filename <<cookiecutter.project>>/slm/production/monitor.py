"""The monitor: the newest window of a log against the targets, the log's own beginning and the training rows."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from slm.contract import Contract
from slm.cost import token_money
from slm.errors import SlmError
from slm.evaluate.metrics import Result, cost_per_1k
from slm.evaluate.release import load_report
from slm.production import drift
from slm.production.logs import CLOCK, LogLine, read_logs
from slm.report import plots
from slm.report.tables import markdown
from slm.rows import write_json, write_text

CONFIDENCE = 1 - drift.ALPHA  # of the intervals: one check in 200 is a false alarm
FEW = 30  # below this many requests nothing is called ok
SHOWN = 12  # windows in the picture
ERRORS, WAIT, PRICE = MEASURES = ("schema error rate", "latency p95 (s)", "cost per 1,000")
BAD, SHORT = "REGRESSION", "too few"


def watch(settings, contract: Contract, since: str = "", days: int = 0) -> dict:
    """Judge the requests from `since` (an ISO date) on, by default those of the log's last `days`, or
    `production.window_days`; writes monitor.md, .json and .png to outputs/monitor and returns what is in the second:
    figures, and no text of any request. A measure is a regression when its whole interval is past the limit, a distance
    when it is past `production.drift` and no chance; past the limit, but perhaps by chance, is too few to say. Raises
    SlmError for a log or a date that cannot be read."""
    own, logs = settings.production, read_logs(settings.path(settings.production.logs))
    now = datetime.now(UTC)
    lines = [one for one in logs.every if one.time <= now + CLOCK] or logs.every
    end, width = max((one.time for one in lines), default=now), timedelta(days=days or own.window_days)
    begin, parts = _date(since) if since else end - width, {0: []}
    for one in lines:  # window 0 is the newest
        parts.setdefault(0 if one.time >= begin else 1 + int((begin - one.time) / width), []).append(one)
    said = {k: [one for one in part if one.consent] for k, part in parts.items()}
    known = drift.reference(settings, contract)
    if own.reference == "first window":
        first = max((k for k in said if k and len(said[k]) >= drift.FEW), default=None)
        known = None if first is None else drift.of_lines("log's first window", contract, said[first])
    windows = []
    for k in sorted(parts):
        models = {m: measure(settings, [one for one in parts[k] if one.model_version == m]) for m in _models(parts[k])}
        shift = known and len(windows) < SHOWN and drift.distances(settings, known, drift.of_lines("", contract, said[k]))
        edge = begin - (k - 1) * width if k else end
        windows.append({"from": (begin - k * width).isoformat(), "to": edge.isoformat(), "models": models, "drift": shift or {}})
    judged = []
    for model, found in windows[0]["models"].items():
        earlier = (w["models"][model] for w in windows[:0:-1] if model in w["models"])
        first = next((one for one in earlier if one[ERRORS]["n"] >= FEW), {})
        judged += [_judge(settings, model, name, found[name], first.get(name)) for name in MEASURES]
    judged += [_distance(settings, name, windows[0]["drift"].get(name), len(said[0])) for name in drift.KINDS]
    against = f"the {known.name} ({len(known.texts)})" if known else "nothing: there is nothing to compare with"
    notes = [
        f"{len(parts[0])} requests from {begin:%Y-%m-%d} to {end:%Y-%m-%d}, of {len(logs.every)} in the log.",
        f"Drift of {len(said[0])} that may be read, against {against}.",
        *[f"Lines torn or invalid: {len(logs.problems)}, the first at {place}: {why}" for place, why in logs.problems[:1]],
        *[f"Time runs backwards: {len(logs.clock)}, first at {place}: {why}" for place, why in logs.clock[:1]],
        *[f"Left out, dated in the future: {len(logs.every) - len(lines)}."] * (len(lines) < len(logs.every)),
        *[f"Never written, the logger says: {logs.dropped}."] * bool(logs.dropped),
        *[f"The newest request is {(now - end).days} days old."] * (bool(lines) and now - end > width),
        *[f"One model version: {model}." for model in windows[0]["models"] if len(windows[0]["models"]) == 1],
        *["No request in this window: nothing can be said."] * (not parts[0]),
    ]  # fmt: skip
    found = {"notes": notes, "lines": judged, "currency": _money(settings)[1], "windows": windows[:SHOWN], "limit": own.drift}
    folder, text = settings.path("outputs/monitor"), "\n".join(f"- {note}" for note in notes)
    plots.monitor(found, MEASURES, folder / "monitor.png")
    write_json(folder / "monitor.json", found)
    write_text(folder / "monitor.md", f"# Monitor\n\n{text}\n\n{markdown(table(found))}\n![over time](monitor.png)\n")
    return found


def measure(settings, lines: Sequence[LogLine]) -> dict[str, dict | None]:
    """Of the requests of one model: the share that could not be used (Clopper & Pearson 1934), the wait that 95 % stay
    below, and the price by the reports' formula; as {"value", "low", "high", "n"}, None where nothing is known. Waits
    and prices are of requests that were answered."""
    import numpy as np
    from scipy.stats import norm
    from statsmodels.stats.proportion import proportion_confint

    bad, n, (end, _) = sum(not one.parse_ok for one in lines), len(lines), _money(settings)
    answered = [one for one in lines if one.output]
    waits = [one.latency_s for one in answered]
    middle = None if end else quantile(waits, 0.5)
    found = {ERRORS: _facts(bad / n, *proportion_confint(bad, n, alpha=1 - CONFIDENCE, method="beta"), n), WAIT: quantile(waits, 0.95)}
    if middle:
        each = [cost_per_1k(settings, Result(name="", set="", latency_p50_s=middle[key])) for key in ("value", "low", "high")]
        return found | {PRICE: None if each[0] is None else _facts(*each, len(waits))}
    counted = [(one.tokens_in, one.tokens_out) for one in answered if None not in (one.tokens_in, one.tokens_out)]
    each = [1000 * token_money(end, *tokens) for tokens in counted if end]
    if len(each) < 2:
        return found | {PRICE: None}
    mean, reach = np.mean(each), norm.ppf((1 + CONFIDENCE) / 2) * np.std(each, ddof=1) / len(each) ** 0.5
    return found | {PRICE: _facts(mean, mean - reach, mean + reach, len(each))}


def quantile(values: Sequence[float], q: float) -> dict | None:
    """A quantile and its distribution-free interval between two order statistics (David & Nagaraja 2003, 7.1)."""
    import numpy as np
    from scipy.stats import binom

    if not values:
        return None
    ordered, n = np.sort(values), len(values)
    low, high = binom.ppf([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], n, q).astype(int)
    value = float(np.quantile(ordered, q))
    return _facts(value, min(value, ordered[max(0, low - 1)]), max(value, ordered[min(high, n - 1)]), n)


def table(found: dict) -> list[dict]:
    """The judged measures as short text, a line each."""

    def cell(value: float | None) -> str:
        return "-" if value is None else f"{value:.4g}"

    shown = []
    for line in found["lines"]:
        span = f"{cell(line['low'])} to {cell(line['high'])}" if "low" in line else f"p = {line['p']:.2g}" if "p" in line else "-"
        unit = f" ({found['currency']})" * (line["measure"] == PRICE)
        names = {"model": line["model"], "measure": line["measure"] + unit, "requests": line["n"], "value": cell(line["value"])}
        more = {"interval": span, "before": cell(line.get("before")), "limit": cell(line["limit"]), "verdict": line["verdict"]}
        shown.append(names | more | {"moved": line.get("moved", "")})
    return shown


def _judge(settings, model: str, name: str, metric: dict | None, before: dict | None) -> dict:
    """A measure against its limit: what was promised, and where the log has an earlier window of this model, no more
    than `production.tolerance` above that. Else "before" is the released run's figure, for a lone caller on this side
    of the network, and bounds nothing."""
    task, gates = settings.task, settings.gates
    limit = {ERRORS: 1 - gates.schema_validity, WAIT: task.target_latency_ms / 1000, PRICE: task.target_cost_per_1k}[name]
    if before and name != ERRORS:
        limit = min(limit, (1 + settings.production.tolerance) * before["value"])
    facts = {"before": before["value"] if before else _released(settings, model).get(name), "limit": limit}
    if metric is None:
        verdict = "not measured"
    else:  # past the limit by its value alone: more requests would tell
        verdict = BAD if metric["low"] > limit else SHORT if metric["n"] < FEW or metric["value"] > limit else "ok"
    return {"model": model, "measure": name, **(metric or {"value": None, "n": 0}), **facts, "verdict": verdict}


def _models(lines: Sequence[LogLine]) -> list[str]:
    return list(dict.fromkeys(one.model_version for one in lines))


def _distance(settings, name: str, facts: dict | None, n: int) -> dict:
    limit, facts = settings.production.drift, facts or {"value": None}
    far = facts["value"] is not None and facts["value"] > limit
    verdict = BAD if far and facts["p"] < drift.ALPHA else SHORT if far or facts["value"] is None else "ok"
    return {"model": "all", "measure": name, **facts, "n": n, "limit": limit, "verdict": verdict}


def _released(settings, model: str) -> dict[str, float | None]:
    """What the evaluation report says of a file that "<run> <quant>" names; nothing without one."""
    run, _, quant = model.partition(" ")
    try:
        facts = load_report(settings, run)["results"]["dev"][quant]
    except (SlmError, KeyError):
        return {}
    result = Result.model_validate(facts)
    valid = result.metrics.get("schema_validity")
    price = cost_per_1k(settings, result, _money(settings)[0])
    return {ERRORS: valid and 1 - valid.value, WAIT: result.latency_p95_s, PRICE: price}


def _money(settings) -> tuple:
    """The endpoint that is paid by the token, or None; and the currency of its prices, or of the rates."""
    end = settings.production.endpoint
    return (end, "USD") if end.usd_per_1m_input or end.usd_per_1m_output else (None, settings.cost.currency)


def _facts(value: float, low: float, high: float, n: int) -> dict:
    return {"value": float(value), "low": float(low), "high": float(high), "n": n}


def _date(text: str) -> datetime:
    try:
        day = datetime.fromisoformat(text)
    except ValueError:
        raise SlmError(f"--since {text!r}: not a date; write it as 2026-11-20.") from None
    return day if day.tzinfo else day.replace(tzinfo=UTC)
