"""What was spent (registry/costs.jsonl, one line per item) and the formulas that say whether a fine-tune pays."""

from slm import registry
from slm.errors import SlmError

ITEMS = (
    "teacher_generation_cost", "data_review_cost", "gpu_training_cost", "eval_inference_cost",
    "deployment_inference_cost", "engineering_time",
)  # fmt: skip


def add(settings, item: str, money: float, **facts) -> dict:
    """Append one expense in `settings.cost.currency`; `facts` (tokens, hours, model, batch) are kept beside it."""
    if item not in ITEMS:
        raise SlmError(f"cost item {item!r}: it must be one of {', '.join(ITEMS)}.")
    line = {"item": item, "money": round(float(money), 8), "currency": settings.cost.currency, "run_id": settings.run_id}
    return registry.append(settings, "costs", line | facts)


def entries(settings, item: str | None = None) -> list[dict]:
    """The ledger's lines, oldest first, of one item or of all."""
    return [line for line in registry.read(settings, "costs") if item in (None, line["item"])]


def spent(settings, item: str | None = None) -> float:
    """Money spent so far on one item or on all."""
    return sum(line["money"] for line in entries(settings, item))


def token_money(end, tokens_in: int, tokens_out: int) -> float:
    """Money for one call at an endpoint's prices per million tokens."""
    return (tokens_in * end.usd_per_1m_input + tokens_out * end.usd_per_1m_output) / 1e6


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
