"""What was spent (registry/costs.jsonl, one line per item) and the formulas that say whether a fine-tune pays."""

import math
from collections import Counter

from slm import registry
from slm.errors import SlmError

ITEMS = (
    "teacher_generation_cost", "data_review_cost", "gpu_training_cost", "eval_inference_cost",
    "deployment_inference_cost", "engineering_time",
)  # fmt: skip
RATES = {  # what an hour costs, by item; a teacher is paid by the token
    "data_review_cost": "review_hourly_rate", "gpu_training_cost": "gpu_hourly_rate",
    "eval_inference_cost": "gpu_hourly_rate", "deployment_inference_cost": "serving_hourly_rate",
    "engineering_time": "engineering_hourly_rate",
}  # fmt: skip


def add(settings, item: str, money: float, **facts) -> dict:
    """Append one expense in `settings.cost.currency`; `facts` (tokens, hours, model, batch) are kept beside it."""
    if item not in ITEMS:
        raise SlmError(f"cost item {item!r}: it must be one of {', '.join(ITEMS)}.")
    line = {"item": item, "money": round(float(money), 8), "currency": settings.cost.currency, "run_id": settings.run_id}
    return registry.append(settings, "costs", line | facts)


def add_hours(settings, item: str, hours: float, **facts) -> dict:
    """Append hours of a machine or a person at the settings' hourly rate; returns the line."""
    rate = getattr(settings.cost, RATES[item]) or 0.0
    return add(settings, item, hours * rate, hours=round(hours, 5), hourly_rate=rate, **facts)


def answered(settings, model, answers, seconds: float) -> None:
    """Append what answers in an evaluation cost: tokens at the endpoint's prices, else hours of this machine. Programs,
    and a teacher whose purse has paid already, are left out."""
    used = sum(a.prompt_tokens for a in answers), sum(a.completion_tokens for a in answers)
    if not used[1] or getattr(model, "purse", None):
        return
    facts = {"model": model.name, "requests": len(answers), "tokens_in": used[0], "tokens_out": used[1]}
    if (end := getattr(model, "endpoint", None)) is None:
        add_hours(settings, "eval_inference_cost", seconds / 3600, **facts)
    else:
        flat = settings.cost.larger_price_per_1m_tokens if end == settings.model.larger else 0.0
        add(settings, "eval_inference_cost", token_money(end, *used, flat), **facts)


def serve(settings, lines) -> list[dict]:
    """Book what answering cost, per day and model version: tokens at `production.endpoint`'s prices (in USD; requests
    without a token count are not priced), else what the callers waited at `cost.serving_hourly_rate`. `lines`: all of a
    log (`Logs.every`). What a day has been booked for already is not booked again. Returns the new entries: none for the
    invented sample log, and none before there is a rate."""
    item, end, days = "deployment_inference_cost", settings.production.endpoint, {}
    priced = bool(end.usd_per_1m_input or end.usd_per_1m_output)
    if settings.production.logs.endswith(".sample.jsonl") or not priced and settings.cost.serving_hourly_rate is None:
        return []
    for one in lines:
        if one.output:
            due = days.setdefault((str(one.time.date()), one.model_version), Counter())
            due.update(requests=1, hours=one.latency_s / 3600, tokens_in=one.tokens_in or 0, tokens_out=one.tokens_out or 0)
    booked = []
    with registry.locked(settings, "serving"):
        for entry in entries(settings, item):
            if due := days.get((entry.get("day"), entry.get("model"))):
                due.subtract({key: entry[key] for key in due})
        for (day, model), due in sorted(days.items()):
            if due["requests"] > 0:
                facts = {"day": day, "model": model, **due, "hours": round(max(0.0, due["hours"]), 5)}
                tokens = token_money(end, due["tokens_in"], due["tokens_out"])
                money = tokens if priced else facts["hours"] * settings.cost.serving_hourly_rate
                booked.append(add(settings, item, money, **facts, currency="USD" if priced else settings.cost.currency))
    return booked


def by_hand(settings, item: str, hours: float | None, money: float | None, note: str) -> dict:
    """A person's entry: hours at the settings' rate, or money; a negative one takes a wrong entry back. Raises SlmError
    for neither or both, nothing, and hours of what is paid by the token."""
    amount = money if hours is None else hours
    if (hours is None) == (money is None) or not math.isfinite(amount) or not amount:
        raise SlmError("cost add: give --hours or --money, one of them, and a number other than 0.")
    if hours is not None and item == "teacher_generation_cost":
        raise SlmError(f"cost add: {item} is paid by the token; give --money.")
    return (add_hours if hours is not None and item in RATES else add)(settings, item, amount, note=note)


def entries(settings, item: str | None = None) -> list[dict]:
    """The ledger's lines, oldest first, of one item or of all."""
    return [line for line in registry.read(settings, "costs") if item in (None, line["item"])]


def spent(settings, item: str | None = None) -> float:
    """Money spent so far on one item or on all."""
    return sum(line["money"] for line in entries(settings, item))


def ledger(settings) -> list[dict]:
    """A line per item in `cost.currency`, and their sum: hours, tokens, money of this run and of the project."""
    known = [line for line in entries(settings) if line["currency"] == settings.cost.currency]

    def line(item: str, found: list[dict]) -> dict:
        tokens = sum(e.get("tokens_in", 0) + e.get("tokens_out", 0) for e in found)
        hours, money = (round(float(sum(e.get(key, 0) for e in found)), 4) for key in ("hours", "money"))
        own = round(float(sum(e["money"] for e in found if e["run_id"] == settings.run_id)), 4)
        return {"item": item, "hours": hours, "tokens": tokens, "this run": own, "project": money}

    return [*(line(item, [e for e in known if e["item"] == item]) for item in ITEMS), line("all", known)]


def experiment(settings) -> float:
    """`total_experiment_cost` from the ledger, people's time not counted: validation inference is the judge's of 04."""
    lines = {line["item"]: line for line in ledger(settings)}
    gpu, judged = lines["gpu_training_cost"], [e for e in entries(settings, "data_review_cost") if "judge" in e]
    return total_experiment_cost(
        lines["teacher_generation_cost"]["project"], sum(e["money"] for e in judged), gpu["hours"],
        gpu["project"] / gpu["hours"] if gpu["hours"] else 0.0, lines["eval_inference_cost"]["project"],
    )  # fmt: skip


def token_money(end, tokens_in: int, tokens_out: int, flat: float = 0.0) -> float:
    """Money for one call at an endpoint's prices per million tokens; `flat` where it names none."""
    return (tokens_in * (end.usd_per_1m_input or flat) + tokens_out * (end.usd_per_1m_output or flat)) / 1e6


def total_experiment_cost(
    teacher_generation_cost: float, validation_inference_cost: float, training_gpu_hours: float,
    gpu_hourly_rate: float, eval_cost: float,
) -> float:  # fmt: skip
    """teacher + validation inference + hours x rate + evaluation (the workflow's cost model)."""
    return teacher_generation_cost + validation_inference_cost + training_gpu_hours * gpu_hourly_rate + eval_cost


def monthly_cost(
    requests_per_month: float, average_tokens_per_request: float, cost_per_token: float, hosting_cost: float
) -> float:
    """requests x tokens x price per token + hosting (the workflow's cost model)."""
    return requests_per_month * average_tokens_per_request * cost_per_token + hosting_cost


def pays_off(savings_per_month: float, maintenance_cost_per_month: float) -> bool:
    """Whether a fine-tune earns its keep: it saves more per month than it costs to maintain."""
    return savings_per_month > maintenance_cost_per_month


def break_even_month(spent: float, savings_per_month: float, maintenance_cost_per_month: float) -> int | None:
    """The month after whose end everything spent has come back, 0 where nothing was; None when it never does."""
    if not pays_off(savings_per_month, maintenance_cost_per_month):
        return None
    return max(0, math.ceil(spent / (savings_per_month - maintenance_cost_per_month) - 1e-9))
