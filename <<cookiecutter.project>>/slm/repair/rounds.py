"""Repair rounds: the plan of a run goes through 03 to 06 as a new run, which is kept only where it proves better."""

import json
import re
import shutil
from collections import Counter
from itertools import count

import yaml

from slm import registry, runner
from slm.contract import Contract
from slm.curate.versions import find
from slm.errors import SlmError
from slm.evaluate import compare_results, load_candidate
from slm.evaluate.candidate import NAME, by_set
from slm.generate.plan import batches, judged
from slm.repair.plan import NEEDS_TEACHER, Plan, next_step, read_plan
from slm.report import tables
from slm.rows import write_text
from slm.settings import Settings, load_settings

SAME = ("model", "train", "preference", "evaluate")  # what a round may not change, or it would compare two things at once


def rounds(run_id: str, contract: Contract, config: str, given: dict, most: int) -> list[dict]:
    """Up to `most` rounds, each from the best run so far, beginning with `run_id`; returns their registry records. A
    round that was interrupted goes on. Raises SlmError when there is nothing that rows could mend."""
    best, done = run_id, []
    name = re.sub(r"-repair-\d+$", "", run_id)
    while len(done) < most:
        known = {r["run_id"] for r in registry.read(_like(config, run_id, run_id, given)[0], "runs") if r["stage"] == "repair"}
        new = next(f"{name}-repair-{n}" for n in count(1) if f"{name}-repair-{n}" not in known)
        record = _round(best, new, contract, config, given)
        if record is None:
            break
        done.append(record)
        best = new if record["status"] == "kept" else best
    return done


def plan_for(run_id: str, config: str, given: dict) -> tuple[Settings, Plan]:
    """Run 07 for a run; returns its settings and its plan."""
    settings, overrides = _like(config, run_id, run_id, given)
    runner.run(settings, ["07"], config, overrides)
    file = f"outputs/runs/{run_id}/repair_plan.json"
    return settings, read_plan(settings.model_copy(update={"repair": settings.repair.model_copy(update={"plan": file})}))


def _like(config: str, run_id: str, new: str, given: dict) -> tuple[Settings, dict]:
    """Settings and overrides of run `new`: model, recipe and evaluation as `run_id` had them, the rest as project.yaml
    says today, `given` over all. Raises SlmError when the run is unknown."""
    file = load_settings(config, run_id=run_id).run_dir / "settings.yaml"
    if not file.is_file():
        raise SlmError(f"{file}: there is no such run; train and evaluate it first.")
    was = yaml.safe_load(file.read_text(encoding="utf-8"))
    now = load_settings(config, was["profile"], {}, new).model_dump()
    own = {f"{s}.{k}": v for s in SAME for k, v in was[s].items() if now[s][k] != v} | {"train.dataset": ""} | given
    return load_settings(config, was["profile"], own, new), own


def _round(best: str, new: str, contract: Contract, config: str, given: dict) -> dict | None:
    settings, overrides = _like(config, best, new, given)
    base, of_base = _like(config, best, best, given)
    locked, results = registry.check_locked(base), [r for r in load_candidate(base, best) if r.name == NAME]
    if odd := [r.set for r in results if r.set_hash != locked[r.set]]:
        raise SlmError(f"run {best} was evaluated on another data/eval/{odd[0]}.jsonl; run 06_evaluate for it again.")
    file = settings.run_dir / "applied_plan.json"
    overrides = {**overrides, "repair.plan": str(file.relative_to(settings.root))}
    settings = load_settings(config, settings.profile, overrides, new)
    if not file.is_file():  # else an interrupted round goes on
        _, plan = plan_for(best, config, given)
        if not plan.requests:
            print(next_step(base, plan))
            return None
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(base.run_dir / "repair_plan.json", file)
    plan = read_plan(settings, contract)
    trained = registry.latest(settings, "runs", stage="train", status="completed", run_id=best)
    held = find(settings, trained["parents"]["dataset"])["parents"] if trained else {}
    written = settings.generate.teacher == "recorded"  # by hand then
    if written and not _new_files(settings, held):
        raise SlmError(f"{NEEDS_TEACHER}, in a file of their own; the plan: {base.run_dir / 'repair_plan.md'}.")
    runner.run(settings, ["04-06" if written else "03-06"], config, overrides, resume=True)
    record, text = _judged(settings, contract, best, plan)
    record["files"] = [str(f.relative_to(settings.root)) for f in _new_files(settings, held)]
    write_text(settings.path(f"outputs/eval_reports/{new}/repair.md"), text)
    print(text)
    if record["status"] == "discarded":
        for path in _new_files(settings, held):
            path.rename(settings.run_dir / path.name)
        runner.run(base, ["04"], config, of_base)  # the accepted rows are those of the best run again
    return registry.append(settings, "runs", record)


def _new_files(settings, held: dict) -> list:
    return [path for path in batches(settings) if str(path.relative_to(settings.root)) not in held]


def _judged(settings, contract: Contract, best: str, plan: Plan) -> tuple[dict, str]:
    """The record of a round and its report: both runs paired on dev and golden, and what became of each cluster."""
    old, new = (by_set([r for r in load_candidate(settings, run) if r.name == NAME]) for run in (best, settings.run_id))
    found = {name: compare_results(new[name][NAME], old[name][NAME], contract, settings) for name in ("dev", "golden")}
    dev, golden = found.values()
    critical = [sum(not s.critical_ok for s in r["golden"][NAME].scores) for r in (old, new)]
    helped = dev.outcome == "better" or not settings.repair.proven and dev.outcome != "worse" and dev.difference.value > 0
    regressed = golden.outcome == "worse" or critical[1] > critical[0]
    status = "kept" if helped and not regressed else "discarded"
    why = f"dev {dev.outcome}" + (", golden regressed" if regressed else ", golden stable")
    gates, rows = Counter((r["row"]["meta"]["provenance"].get("cluster"), r["gate"]) for r in judged(settings) if "row" in r), []
    for item in plan.items:
        accepted, seen = gates[item.cluster, ""], sum(n for (cluster, _), n in gates.items() if cluster == item.cluster)
        fixed = len({*item.failed} & {*dev.fixed})
        rows.append({"cluster": item.cluster, "failures": len(item.failed), "fixed": fixed, "rows asked": item.rows,
                     "written": seen, "accepted": accepted})  # fmt: skip
    lines = [
        {"set": name, "before": f"{c.baseline:.3f}", "after": f"{c.candidate:.3f}", "difference": tables.metric(c.difference),
         "McNemar p": f"{c.mcnemar_p:.3f}", "fixed": len(c.fixed), "broken": len(c.broken),
         "unchanged": c.difference.n - len(c.fixed) - len(c.broken), "outcome": c.outcome} for name, c in found.items()
    ]  # fmt: skip
    verdict = f"Run {settings.run_id} is {status}: {why}; {critical[0]} -> {critical[1]} golden rows with a critical field wrong."
    changed = "".join(f"- {name}, {what}: {', '.join(ids)}\n" for name, c in found.items()
                      for what, ids in (("fixed", c.fixed), ("broken", c.broken)) if ids)  # fmt: skip
    text = f"# Repair of {best}\n\n{verdict} The same rows, paired; rounds are chosen on dev, so only test says what it is worth.\n\n"
    text += f"{tables.markdown(lines)}\n## Clusters\n\n{tables.markdown(rows)}\n## Rows\n\n{changed or 'None changed.'}"
    facts = {"stage": "repair", "status": status, "run_id": settings.run_id, "parents": {"run": best}, "verdict": verdict}
    facts |= {"clusters": [i.cluster for i in plan.items if i.rows], "rows": rows, "settings": settings.hash}
    return facts | {name: json.loads(c.model_dump_json()) for name, c in found.items()}, text
