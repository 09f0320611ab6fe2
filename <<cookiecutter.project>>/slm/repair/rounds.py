"""Repair rounds: the plan of a run goes through 03 to 06 as a new run, which is kept only where it proves better."""

import re
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
from slm.report import compare, tables
from slm.rows import write_text
from slm.settings import Settings, load_settings

SAME = ("model", "train", "preference", "evaluate")  # a round that changed these too would compare two things


def rounds(run_id: str, contract: Contract, config: str, given: dict, most: int) -> list[dict]:
    """Plan the repair of a run (07) and carry out `most` rounds of it, each from the best run so far; returns their
    registry records. An interrupted round goes on where it stopped. Raises SlmError when one cannot begin."""
    best, done = run_id, []
    while True:
        base, own = _like(config, best, best, given)
        taken = {r["run_id"] for r in registry.read(base, "runs") if r["stage"] == "repair"}
        root = re.sub(r"-repair-\d+$", "", run_id)
        new = next(name for n in count(1) if (name := f"{root}-repair-{n}") not in taken)
        file, more = f"outputs/runs/{new}/applied_plan.json", len(done) < most
        if not (more and base.path(file).is_file()):
            runner.run(base, ["07"], config, own)
            plan = read_plan(base, f"outputs/runs/{best}/repair_plan.json", contract)
            if not more or not plan.requests or any(item.check_first for item in plan.items):
                print(next_step(base, plan))
                return done
            write_text(base.path(file), plan.model_dump_json(indent=1))
        settings, overrides = _like(config, best, new, given | {"repair.plan": file})
        done.append(_round(settings, contract, base, config, overrides, own))
        best = new if done[-1]["status"] == "kept" else best


def _like(config: str, run_id: str, new: str, given: dict) -> tuple[Settings, dict]:
    """Settings and overrides of run `new`: model, recipe and evaluation as `run_id` was trained with, the rest as
    project.yaml says today, `given` over all. Raises SlmError when the run was not trained."""
    file = load_settings(config, run_id=run_id).path(f"outputs/adapters/{run_id}/settings.yaml")
    if not file.is_file():
        raise SlmError(f"{file}: there is no such file; train and evaluate run {run_id} first.")
    was = yaml.safe_load(file.read_text(encoding="utf-8"))
    now = load_settings(config, was["profile"], {}, new).model_dump()
    own = {f"{s}.{k}": v for s in SAME for k, v in was[s].items() if now[s][k] != v} | {"train.dataset": ""} | given
    return load_settings(config, was["profile"], own, new), own


def _round(settings, contract: Contract, base, config: str, overrides: dict, own: dict) -> dict:
    """03 to 06 under the run id of `settings`, the comparison with run `base`, and its record. Of a round that is
    discarded the new files of data/generated are put into its run's folder, and 04 restores the accepted rows."""
    trained = registry.latest(base, "runs", stage="train", status="completed", run_id=base.run_id)
    held = find(base, trained["parents"]["dataset"] or "")["parents"]
    locked, plan = registry.check_locked(base), read_plan(base, settings.repair.plan, contract)
    if odd := [r.set for r in load_candidate(base, base.run_id) if r.set_hash not in ("", locked[r.set])]:
        raise SlmError(f"run {base.run_id} was evaluated on another data/eval/{odd[0]}.jsonl; run 06 for it again.")

    def added() -> list:
        return [path for path in batches(settings) if str(path.relative_to(settings.root)) not in held]

    by_hand = settings.generate.teacher == "recorded"
    if by_hand and not added():
        raise SlmError(f"{NEEDS_TEACHER}, in a file of their own; the plan is {base.run_dir / 'repair_plan.md'}.")
    runner.run(settings, ["04-06" if by_hand else "03-06"], config, overrides, resume=True)
    record, text = _outcome(settings, contract, base, plan)
    record["files"] = [path.name for path in added()]
    write_text(settings.path(f"outputs/eval_reports/{settings.run_id}/repair.md"), text)
    print(text)
    if record["status"] == "discarded":
        for path in [f for rows in added() for f in (rows, rows.with_suffix(".unread.txt")) if f.is_file()]:
            print(f"{path.name} now lies in {path.rename(settings.run_dir / path.name).parent}")
        runner.run(base, ["04"], config, own)
    return registry.append(settings, "runs", record)


def _outcome(settings, contract: Contract, base, plan: Plan) -> tuple[dict, str]:
    """The record of a round and its report: both runs paired on dev and golden, and what became of each cluster."""
    old, new = (by_set([r for r in load_candidate(settings, s.run_id) if r.name == NAME]) for s in (base, settings))
    dev, golden = (compare_results(new[n][NAME], old[n][NAME], contract, settings) for n in ("dev", "golden"))
    was, now = (sum(not s.critical_ok for s in r["golden"][NAME].scores) for r in (old, new))
    gain = dev.difference.value > 0 and dev.outcome != "worse" and not settings.repair.proven
    kept = (dev.outcome == "better" or gain) and golden.outcome != "worse" and now <= was
    rows = Counter((r["row"]["meta"].get("provenance", {}).get("cluster"), not r["gate"]) for r in judged(settings))
    clusters = [
        {"cluster": i.name, "failures": len(i.findings), "fixed": sum(f.row_id in dev.fixed for f in i.findings),
         "asked": i.rows, "accepted": rows[i.name, True], "rejected": rows[i.name, False]} for i in plan.items if i.rows
    ]  # fmt: skip
    told = [
        f"{name} {c.outcome}, {c.baseline:.3f} -> {c.candidate:.3f} ({c.difference.value:+.3f} [{c.difference.low:+.3f}, "
        f"{c.difference.high:+.3f}]): {len(c.fixed)} rows fixed, {len(c.broken)} broken, "
        f"{c.difference.n - len(c.fixed) - len(c.broken)} unchanged" for name, c in (("dev", dev), ("golden", golden))
    ]  # fmt: skip
    status = "kept" if kept else "discarded"
    verdict = f"Run {settings.run_id} is {status}; {'; '.join(told)}; {now} critical failures on golden, before {was}."
    parts = (f"# Repair of {base.run_id}", verdict, "Rounds are chosen on dev: what they are worth, only test says.",
             tables.markdown(clusters), compare.render(settings, base.run_id, settings.run_id))  # fmt: skip
    facts = {"stage": "repair", "status": status, "run_id": settings.run_id, "verdict": verdict, "rows": clusters}
    facts |= {"parents": {"run": base.run_id}, "clusters": [c["cluster"] for c in clusters], "settings": settings.hash}
    return facts | {"dev": dev.model_dump(mode="json"), "golden": golden.model_dump(mode="json")}, "\n\n".join(parts)
