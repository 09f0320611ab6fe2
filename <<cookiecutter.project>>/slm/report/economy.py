"""Whether the fine-tune pays: what was spent, what a month costs with it and without it, and when it breaks even."""

from collections.abc import Mapping

from slm import cost
from slm.errors import SlmError
from slm.evaluate.baselines import load_baselines
from slm.evaluate.candidate import NAME, by_set
from slm.evaluate.metrics import Result, cost_per_1k
from slm.evaluate.release import chosen
from slm.generate.plan import seed_rows

RIVALS = ("prompted_base", "larger")


def economy(settings, shown: Mapping[str, Result], pairs: Mapping = {}) -> dict:  # noqa: B006
    """The business case as plain data. `shown`: the results on dev, of which the file that ships stands for the
    fine-tune where 08 timed it; `pairs`: its comparisons there, the evidence for `cost.unlocks`. The alternative is
    the larger model at its prices; where none was run, a hosted one at `cost.larger_price_per_1m_tokens` that reads the
    better prompt. What the settings do not say is named in `missing`, never guessed."""
    rates, requests = settings.cost, max(1, settings.task.requests_per_month)
    ships = [shown[n] for n in (chosen(settings, settings.run_id), NAME) if n in shown and shown[n].latency_p50_s is not None]
    own, larger = ships[0] if ships else None, shown.get("larger")
    other = larger if larger and larger.ran else shown.get("prompted_base")
    machine = bool(settings.model.larger_gguf) and other is larger
    prices = [own and cost_per_1k(settings, own), None]
    if other and not (machine and other.latency_p50_s is None):
        prices[1] = cost_per_1k(settings, other, None if machine else settings.model.larger)
    tokens = [r.prompt_tokens + r.completion_tokens if r else 0.0 for r in (own, other)]
    hosting = [rates.hosting_per_month, rates.hosting_per_month if machine else 0.0]
    monthly = [
        None if price is None else cost.monthly_cost(requests, n or 1, (price / 1000 - base / requests) / (n or 1), base)
        for price, n, base in zip(prices, tokens, hosting, strict=True)
    ]
    who = "the larger model" if other is larger else "a hosted model with the better prompt"
    spent, upkeep = sum(line["project"] for line in cost.ledger(settings)), rates.maintenance_per_month
    savings = None if None in monthly else monthly[1] - monthly[0]
    asked = {
        "cost.serving_hourly_rate (and 06, which times the model)": monthly[0], "cost.maintenance_per_month": upkeep,
        "what the alternative costs (model.larger with its prices, or cost.larger_price_per_1m_tokens)": monthly[1],
    }  # fmt: skip
    found = {
        "currency": rates.currency, "requests_per_month": requests, "spent": spent, "experiment": cost.experiment(settings),
        "savings_per_month": savings, "maintenance_per_month": upkeep, "alternative": who,
        "unlocks": rates.unlocks.strip(), "missing": [name for name, value in asked.items() if value is None],
        "ledger": spending(settings), "other_currencies": foreign(settings),
        "monthly": [
            {"": name, "tokens per request": f"{n:.0f}" if n else "-", "per 1,000 requests": _money(p, 4), "per month": _money(m)}
            for name, n, p, m in zip(("fine-tuned", who), tokens, prices, monthly, strict=True)
        ],
        "sensitivity": {},
    }  # fmt: skip
    if savings is not None and upkeep is not None:
        found["break_even_month"] = cost.break_even_month(spent, savings, upkeep)
    if prices[0] is not None and tokens[1]:
        found["sensitivity"] = {
            "tokens": tokens[1], "price": prices[1] * 1000 / tokens[1] if prices[1] else None, "hosting": hosting[0],
            "own_per_request": max(0.0, prices[0] / 1000 - hosting[0] / requests),
        }  # fmt: skip
    return found | {"verdict": verdict(found, pairs)}


def verdict(found: dict, pairs: Mapping) -> str:
    """One sentence: it pays, do not ship, or what must be said first. A recorded reason ships what saves nothing; beside
    it stands whether dev shows the model to be better than prompting."""
    unit, upkeep, savings = found["currency"], found["maintenance_per_month"], found["savings_per_month"]
    if not found["missing"] and found["break_even_month"] is not None:
        when = f"the {found['spent']:,.2f} spent are back in month {found['break_even_month']}"
        when = when if found["break_even_month"] else "nothing is on record as spent"
        return f"It pays: it saves {savings:,.2f} {unit} a month against {upkeep:,.2f} of maintenance; {when}."
    why = f"it saves {savings:,.2f} {unit} a month, maintenance takes {upkeep:,.2f}" if not found["missing"] else ""
    if found["unlocks"]:
        shown = ", ".join(f"{name.replace('_', ' ')} {pairs[name].outcome}" for name in RIVALS if name in pairs)
        proof = f"the fine-tuned model on dev against prompting: {shown}" if shown else "not compared with prompting yet"
        return f"Ships for what prompting cannot give: {found['unlocks'].rstrip('.')} ({proof}); {why or 'savings are not known'}."
    if why:
        return f"Do not ship: {why}. Only behaviour that prompting cannot give would be a reason; record it in cost.unlocks."
    return f"Not known whether it pays: say {'; '.join(found['missing'])} in project.yaml."


def lines(found: dict) -> list[str]:
    """The sentences below the verdict: what was spent, and what the figures assume."""
    unit, hosted = found["currency"], "prompt and answer at its price per token"
    told = [f"Spent on the project so far: {found['spent']:,.2f} {unit}; of this {found['experiment']:,.2f} are the experiment "
            "(teacher, validation inference, GPU hours at their rate, evaluation), the rest people's time and serving."]  # fmt: skip
    told.append(f"A month is {found['requests_per_month']:,} requests (task.requests_per_month). The fine-tuned model: the median "
                f"wait of one request at the machine's hourly rate, plus hosting, as if requests came one after the other; "
                f"{found['alternative']}: {hosted}.")  # fmt: skip
    if found["other_currencies"]:
        told.append(f"Not counted, for they are in another currency: {found['other_currencies']}.")
    return told


def spending(settings) -> list[dict]:
    """The ledger as a table, the sum last."""
    unit, found = settings.cost.currency, cost.ledger(settings)
    total = {key: sum(line[key] for line in found) for key in found[0] if key != "item"}
    return [
        {"item": line["item"], "hours": f"{line['hours']:.2f}", "of these without a rate": f"{line['hours without a rate']:.2f}",
         "tokens": f"{line['tokens']:,}", f"this run ({unit})": _money(line["this run"]), f"project ({unit})": _money(line["project"])}
        for line in [*found, {"item": "all", **total}]
    ]  # fmt: skip


def foreign(settings) -> str:
    """Entries in another currency than the settings', counted."""
    units = [line["currency"] for line in cost.entries(settings) if line["currency"] != settings.cost.currency]
    return ", ".join(f"{units.count(unit)} entries in {unit}" for unit in dict.fromkeys(units))


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


def _money(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"
