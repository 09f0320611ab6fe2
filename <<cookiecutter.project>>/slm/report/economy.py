"""Whether the fine-tune pays: what was spent, what a month costs with it and without it, and when it breaks even."""

from collections.abc import Mapping

from slm import cost
from slm.errors import SlmError
from slm.evaluate.baselines import load_baselines
from slm.evaluate.candidate import NAME, by_set
from slm.evaluate.metrics import Result, cost_per_1k
from slm.evaluate.release import chosen
from slm.generate.plan import seed_rows
from slm.report.tables import title


def economy(settings, shown: Mapping[str, Result], pairs: Mapping | None = None) -> dict:
    """The business case as plain data. `shown`: the results on dev; for the fine-tune stands the file that ships, where
    08 timed it; `pairs`: its comparisons there, the evidence for `cost.unlocks`. The alternative is the larger model;
    where none was run, a hosted one at `cost.larger_price_per_1m_tokens` that reads the better prompt. What the settings
    do not say is named in `missing`, never guessed."""
    rates, larger, ledger = settings.cost, shown.get("larger"), cost.ledger(settings)
    ships = [shown[name] for name in (chosen(settings, settings.run_id), NAME) if name in shown]
    own = side(settings, "fine-tuned", next((r for r in ships if r.latency_p50_s is not None), None))
    if larger and larger.ran:
        other = side(settings, "larger model", larger, None if settings.model.larger_gguf else settings.model.larger)
    else:
        other = side(settings, "hosted model, better prompt", shown.get("prompted_base"), settings.model.larger)
    costs = [own["per month"], other["per month"]]
    served = next(line["project"] for line in ledger if line["item"] == "deployment_inference_cost")  # part of each month
    needed = {
        "cost.serving_hourly_rate": costs[0], "cost.maintenance_per_month": rates.maintenance_per_month,
        "the alternative's price (model.larger, or cost.larger_price_per_1m_tokens)": costs[1],
    }  # fmt: skip
    found = {
        "currency": rates.currency, "requests": settings.task.requests_per_month, "own": own, "other": other,
        "spent": round(ledger[-1]["project"] - served, 4), "experiment": cost.experiment(settings), "ledger": ledger,
        "savings": None if None in costs else round(costs[1] - costs[0], 2),
        "maintenance": rates.maintenance_per_month, "hosting": rates.hosting_per_month,
        "unlocks": rates.unlocks.strip(),
        "missing": [name for name, value in needed.items() if value is None],
        "uncounted": sum(line["currency"] != rates.currency for line in cost.entries(settings)),
    }  # fmt: skip
    return found | {"verdict": verdict(found, pairs or {})}


def side(settings, name: str, result: Result | None, endpoint=None) -> dict:
    """A month with one model by `cost.monthly_cost`; money is None where the settings name no price."""
    requests, hosting = max(1, settings.task.requests_per_month), 0.0 if endpoint else settings.cost.hosting_per_month
    tokens = result.prompt_tokens + result.completion_tokens or 1 if result else 0
    price = result and cost_per_1k(settings, result, endpoint)
    each = None if price is None else max(0.0, price / 1000 - hosting / requests)  # its share of hosting is in there
    month = None if price is None else round(cost.monthly_cost(requests, tokens, each / tokens, hosting), 2)
    each = each and round(each, 9)
    return {"model": name, "tokens per request": round(tokens), "per request": each, "per month": month}


def verdict(found: dict, pairs: Mapping) -> str:
    """One sentence: it pays, do not ship, or what must be said first. A recorded reason ships what saves nothing; beside
    it stands whether dev shows the model to be better than prompting."""
    unit, upkeep, savings = found["currency"], found["maintenance"], found["savings"]
    why = f"it saves {savings:,.2f} {unit} a month, maintenance takes {upkeep:,.2f}" if not found["missing"] else ""
    if why and (month := cost.break_even_month(found["spent"], savings, upkeep)) is not None:
        back = f"the {found['spent']:,.2f} spent are back in month {month}" if month else "nothing is on record as spent"
        return f"It pays: {why}; {back}."
    if found["unlocks"]:
        shown = [f"{pairs[name].outcome} against {title(name)}" for name in ("prompted_base", "larger") if name in pairs]
        proof = f"on dev {'; '.join(shown)}" if shown else "not compared with prompting yet"
        known = why or "savings are not known"
        return f"Ships for what prompting cannot give: {found['unlocks'].rstrip('.')} ({proof}); {known}."
    if why:
        return f"Do not ship: {why}. Behaviour that prompting cannot give would be a reason; record it in cost.unlocks."
    return f"Not known whether it pays: say {'; '.join(found['missing'])} in project.yaml."


def months(found: dict) -> list[dict]:
    """The table of what a month costs."""
    return [{name: "-" if value is None else value for name, value in found[one].items()} for one in ("own", "other")]


def before_training(settings, contract) -> dict:
    """The business case before there is a model (01): one that just keeps `task.target_latency_ms`, texts at three
    characters a token; what 02 has measured takes the place of the guess."""
    try:
        known = by_set([r for r in load_baselines(settings, contract) if r.ran]).get("dev", {})
    except SlmError:
        known = {}
    rows = seed_rows(settings)
    size = sum(len(m["content"]) for row in rows for m in contract.messages(row)) / 3 / max(1, len(rows))
    guess = Result(name=NAME, set="dev", prompt_tokens=size, latency_p50_s=settings.task.target_latency_ms / 1000)
    return economy(settings, {"prompted_base": guess} | known | {NAME: guess})
