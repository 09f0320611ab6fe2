"""The written task: task.md and specs/output_schema.json, made from the contract so that they cannot disagree."""

from pathlib import Path

from slm.contract import Contract
from slm.errors import SlmError
from slm.evaluate.scorers import COMMON, metric_names
from slm.generate.plan import shapes
from slm.rows import write_json, write_text

BRIEF = ("goal", "inputs", "non_goals", "failure_modes", "deployment_target", "cost_and_latency")
HIGH_STAKES = ("medic", "health", "clinic", "legal", "law", "financ", "credit", "insurance", "employ", "hiring", "safety")


def require(settings, contract) -> None:
    """Raise SlmError unless there is a whole contract and, in a high-stakes domain, a named expert who reviews."""
    if not isinstance(contract, Contract):
        raise SlmError("task/contract.py: there is no contract; write one in 01_scope before anything else.")
    missing = [name for name in BRIEF if not contract.brief.get(name, "").strip()]
    if missing:
        raise SlmError(f"task/contract.py: the contract's brief lacks {', '.join(missing)}; write them in 01_scope.")
    fields = list(dict.fromkeys(name for shape in shapes(contract.schema) for name in shape["properties"]))
    if not fields:
        raise SlmError("task/contract.py: the output model has no fields; say what must come out.")
    unknown = [n for n in (*contract.critical, *([contract.label_field] if contract.label_field else [])) if n not in fields]
    if unknown:
        raise SlmError(f"task/contract.py: {', '.join(unknown)} is no field of the output; fields: {', '.join(fields)}.")
    domain = settings.task.domain.lower()
    if (settings.task.high_stakes or any(d in domain for d in HIGH_STAKES)) and not settings.task.expert_review.strip():
        risky = f"the domain {settings.task.domain!r} is high-stakes; name the expert who reviews data and answers"
        raise SlmError(f"task.expert_review: {risky} in project.yaml, or do not fine-tune for it.")


def task_text(settings, contract: Contract) -> str:
    """task.md: the eight sections from the contract's brief, its schema and the targets in the settings."""
    brief, task = contract.brief, settings.task
    name = task.expert_review.strip()
    expert = f"\n\nHigh-stakes domain: data and answers are reviewed by {name}." if name else ""
    limit = f"at most {task.target_latency_ms:g} ms per request (p95) and {task.target_cost_per_1k:g} {settings.cost.currency}"
    sections = {
        "Goal": brief["goal"], "Inputs": brief["inputs"], "Output Contract": output_text(contract),
        "Non-goals": brief["non_goals"], "Failure Modes": brief["failure_modes"] + expert,
        "Metrics": metrics_text(contract), "Deployment Target": brief["deployment_target"],
        "Cost and Latency Target": f"{brief['cost_and_latency'].strip()}\n\nIn numbers: {limit} per 1,000 requests, at about {task.requests_per_month:,} requests a month.",
    }  # fmt: skip
    head = f"# Task\n\n`{contract.name}`, written by `01_scope` from `task/contract.py` and `project.yaml`: edit those, not this."
    return "\n\n".join([head, *(f"## {name}\n\n{text.strip()}" for name, text in sections.items())]) + "\n"


def output_text(contract: Contract) -> str:
    """The output contract in words: one JSON object, what it may hold, and the definitions of its fields."""
    definitions, found = contract.schema.get("$defs", {}), shapes(contract.schema)
    one = "Exactly one JSON object and nothing around it, as in `specs/output_schema.json`"
    null = f"\n`{contract.label_field}: {contract.null_label}` says that there is nothing to do."
    null = null if contract.null_label else ""
    if len(found) > 1:
        return f"{one}, of one of these shapes (`?`: may be left out):\n\n```text\n{contract.outline}\n```\n{null}"
    table, notes = f"{one}:\n\n| field | holds | |\n|---|---|---|\n", ""
    for name, node in found[0]["properties"].items():
        holds = _holds(node, definitions).replace("|", "\\|")
        table += f"| `{name}` | {holds} | {'critical' if name in contract.critical else ''} |\n"
        notes += f"\n**{name}.** {node['description'].strip()}\n" if node.get("description") else ""
    return table + notes + null


def metrics_text(contract: Contract) -> str:
    """Primary metric with its target, the metrics beside it, and what counts as critical."""
    critical = ", ".join(f"`{name}`" for name in contract.critical) or "none"
    return (
        f"* Primary: `{contract.primary_metric}`, target {contract.target:g}, with its 95 % interval.\n"
        f"* Beside it: {', '.join(n for n in metric_names(contract)[1:] if n not in COMMON)}; latency and cost.\n"
        f"* Critical fields: {critical}. A golden row with one of them wrong stops a release.\n"
        "* To beat: majority, the rule program, the base model, the base model with a good prompt, a larger model."
    )


def write_spec(settings, contract: Contract) -> list[Path]:
    """Write task.md and specs/output_schema.json; returns their paths. Raises SlmError for an incomplete contract."""
    require(settings, contract)
    return [
        write_text(settings.path("task.md"), task_text(settings, contract)),
        write_json(settings.path("specs/output_schema.json"), contract.schema),
    ]


def _holds(node: dict, definitions: dict) -> str:
    """What a schema node admits, in words for a Markdown cell."""
    if "$ref" in node:
        node = definitions[node["$ref"].rsplit("/", 1)[-1]]
    if options := node.get("anyOf") or node.get("oneOf"):
        return " or ".join(dict.fromkeys(_holds(option, definitions) for option in options))
    if "enum" in node or "const" in node:
        return ", ".join(f"`{value}`" for value in node.get("enum", [node.get("const")]))
    kind = {"null": "`null`", "boolean": "`true` or `false`"}.get(node.get("type"), node.get("type", "any value"))
    if node.get("type") == "object" and node.get("properties"):
        return f"{node.get('title', 'object')} ({', '.join(f'`{name}`' for name in node['properties'])})"
    return kind + (f" matching `{node['pattern']}`" if node.get("pattern") else "")
