"""Two runs on the sets they share: the paired difference of each model, and the rows that were fixed and broken."""

from slm.contract import Contract
from slm.errors import SlmError
from slm.evaluate.candidate import NAME, by_set, load_candidate
from slm.evaluate.compare import compare_results
from slm.evaluate.release import load_report
from slm.report import tables
from slm.report.render import fill


def render(settings, a: str, b: str) -> str:
    """Run `b` minus run `a` as Markdown. Raises SlmError when a run was not evaluated, or when contract, set or rows
    are not the same in both."""
    reports = [load_report(settings, run) for run in (a, b)]
    found = [by_set([r for r in load_candidate(settings, run) if r.ran]) for run in (a, b)]
    contracts = [report["contract"] for report in reports]
    if contracts[0]["hash"] != contracts[1]["hash"] or contracts[0]["primary_metric"] != contracts[1]["primary_metric"]:
        was, now = (f"{c['hash']} ({c['primary_metric']})" for c in contracts)
        raise SlmError(f"runs {a} and {b} do not compare: contract {was} against {now}; run 06_evaluate again for {a}.")
    contract = _recorded(contracts[0])
    lines, changed, shared = [], [], [set for set in found[0] if set in found[1]]
    for set in shared:
        for name in [n for n in found[0][set] if n in found[1][set]]:
            old, new = found[0][set][name], found[1][set][name]
            if old.set_hash != new.set_hash:
                raise SlmError(
                    f"runs {a} and {b} do not compare: data/eval/{set}.jsonl was {old.set_hash[:12]} in {a} and is "
                    f"{new.set_hash[:12]} in {b}; run 06_evaluate again for {a}."
                )
            pair = compare_results(new, old, contract, settings)
            line = tables.comparisons({name: pair.model_dump()})[0]
            model = line.pop("against")
            lines.append({"set": set, "model": model, a: f"{pair.baseline:.3f}", b: f"{pair.candidate:.3f}", **line})
            changed += [
                {"set": set, "model": model, "rows": what, "ids": ", ".join(ids)}
                for what, ids in (("fixed", pair.fixed), ("broken", pair.broken)) if ids and name not in tables.FILES
            ]  # fmt: skip
    if not lines:
        raise SlmError(f"runs {a} and {b} share no model on any set; run 06_evaluate for both.")
    facts = [
        {"run": run, "base": r["model"]["base"], "profile": r["profile"], "settings": r["settings"],
         "dataset version": r["dataset_version"] or "not recorded", "verdict": r["verdict"]}
        for run, r in zip((a, b), reports, strict=True)
    ]  # fmt: skip
    waits = [one["dev"][NAME].model_copy(update={"name": run}) for run, one in zip((a, b), found, strict=True)]
    return fill(
        "compare.md", a=a, b=b, contract=contract, facts=facts, lines=lines, changed=changed,
        first=next((line for line in lines if line["set"] == "golden"), lines[0]),
        confidence=f"{settings.evaluate.confidence:.0%}", waits=tables.results(waits, [contract.primary_metric]),
    )  # fmt: skip


def _recorded(facts: dict) -> Contract:
    """The contract as the report recorded it: scores are compared without the project's own code."""
    contract = object.__new__(Contract)
    contract.__dict__.update(facts)
    return contract
