"""Shadow: a released run and the model in production answer the same logged requests; the new answers reach nobody."""

import json
import time
from collections.abc import Sequence
from types import SimpleNamespace

from slm import cost, registry
from slm.contract import Contract
from slm.errors import SlmError
from slm.evaluate.compare import FEW, paired
from slm.evaluate.metrics import Result, cost_per_1k, interval
from slm.evaluate.release import last_released
from slm.evaluate.scorers import comparable, score_row
from slm.models.base import Answer
from slm.modules import load_module
from slm.production.forget import refuse
from slm.production.logs import LogLine, read_logs
from slm.production.scrub import scrub_logs
from slm.rows import make_row, plain, write_json, write_text

SIDES = ("current", "candidate")
RELEASE, TRAINED = {"stage": "release"}, {"stage": "train", "status": "completed"}
PATIENCE = 3  # so many failed requests in a row: the endpoint is down, which says nothing of the model


def released(settings, run_id: str) -> dict:
    """The record of a run's release. Raises SlmError without one, or when the run was trained again since."""
    refuse(settings, run_id)
    release, train = (registry.latest(settings, "runs", run_id=run_id, **kind) for kind in (RELEASE, TRAINED))
    if not release or train and train["at"] > release["at"]:
        why = "was trained again since its release" if release else "is not released"
        raise SlmError(f"run {run_id} {why}: the locked benchmark comes first, python -m slm release {run_id}")
    return release


def arm(settings, run_id: str, address: str) -> dict:
    """What the client asks a run's model with, the run's own contract.json, at URL or URL#MODEL."""
    file, (url, _, model) = settings.path(f"outputs/gguf/{run_id}/client/contract.json"), address.partition("#")
    try:
        terms = json.loads(file.read_text(encoding="utf-8"))
        return terms | {"url": url, "model": model or terms["model"]}
    except (OSError, ValueError, KeyError, TypeError):
        raise SlmError(f"{file}: missing or torn; run 08_export for run {run_id}.") from None


def shadow(
    settings, contract: Contract, run_id: str, current: str, candidate: str, against: str = "", limit: int = 200
) -> dict:  # fmt: skip
    """Ask both endpoints (URL or URL#MODEL) the newest `limit` requests of `production.logs`, scrubbed; write shadow.md
    and shadow.json beside the run's report, and the record. `against`: the run in production, by default the last one
    released before. Raises SlmError for a run that is not released, and where there is nothing to compare."""
    from slm.report.render import fill

    release, before = released(settings, run_id), against or (last_released(settings, run_id) or {}).get("run_id")
    if not before:
        raise SlmError(f"no run was released before {run_id}; name the one in production: --against RUN.")
    arms = dict(zip(SIDES, (arm(settings, before, current), arm(settings, run_id, candidate)), strict=True))
    old, new = arms.values()
    if old["schema"] != new["schema"] or all(old[key] == new[key] for key in ("url", "model")):
        what = "answer under different schemas" if old["schema"] != new["schema"] else "are one and the same endpoint"
        raise SlmError(f"runs {before} and {run_id} {what}; there is nothing to compare.")
    logs = read_logs(settings.path(settings.production.logs))
    lines = sorted(scrub_logs(logs.lines, settings)[0], key=lambda line: line.time)
    asked = list({plain(line.input): line for line in lines}.values())[-limit:]
    told = {side: {key: terms[key] for key in ("url", "model", "version")} for side, terms in arms.items()}
    report = {"run_id": run_id, "against": before, **told, "log": logs.read, "usable": len(lines)}
    report |= judge(settings, contract, asked, ask(settings, arms, asked))
    folder, text = settings.path(f"outputs/eval_reports/{run_id}"), fill("shadow.md", **report, few=FEW)
    write_json(folder / "shadow.json", report)
    write_text(folder / "shadow.md", text)
    facts = {key: report[key] for key in ("run_id", "against", *SIDES, "requests", "passed", "why")}
    registry.append(settings, "runs", {"stage": "shadow", **facts, "release": release["hash"]})
    return report | {"text": text}


def ask(settings, arms: dict[str, dict], lines: Sequence[LogLine]) -> dict[str, list[Answer]]:
    """Both sides' answers through client/client.py: one request at a time, each side first in every other one. A request
    that fails is a failed answer. Raises SlmError when an endpoint is down, or builds another prompt than was trained."""
    client, answers, said = load_module(settings.path("client/client.py")), {side: [] for side in arms}, ""
    try:
        for terms in arms.values():
            client.check(terms)  # warms it up, too
        for n, line in enumerate(lines):
            for side in list(arms)[:: 1 if n % 2 else -1]:
                text, used, finish, begin = "", {}, "error", time.perf_counter()
                try:
                    reply = client.post(arms[side], line.input)
                    choice, used = reply["choices"][0], reply.get("usage") or {}
                    text, finish = choice["message"]["content"] or "", choice["finish_reason"]
                except (client.ClientError, KeyError, IndexError, TypeError) as error:
                    said = error
                counts = (used.get(f"{what}_tokens", 0) for what in ("prompt", "completion"))
                answers[side].append(Answer(text, time.perf_counter() - begin, *counts, finish))
                if [a.finish_reason for a in answers[side][-PATIENCE:]] == PATIENCE * ["error"]:
                    raise client.ClientError(f"{PATIENCE} requests in a row failed: {said}")
        for side, own in answers.items():
            cost.answered(settings, SimpleNamespace(name=arms[side]["version"]), own, sum(a.latency_s for a in own))
    except client.ClientError as error:
        raise SlmError(f"shadow stopped, nothing is recorded: {error}") from None
    return answers


def judge(settings, contract: Contract, lines: Sequence[LogLine], answers: dict[str, list[Answer]]) -> dict:
    """What the answers say. The candidate does not pass when it breaks the contract more often (McNemar's exact test,
    p < 0.05; McNemar 1947), is worse on the requests that people corrected (paired, as in 06), or is slower at p95 than
    the current model and `task.target_latency_ms`; nor on fewer than 30 requests. Corrected requests are those that the
    model in production got wrong, which favours the candidate: worse there is worse, better is no proof."""
    import numpy as np
    from statsmodels.stats.contingency_tables import mcnemar

    values = {side: [read(contract, answer) for answer in own] for side, own in answers.items()}
    old, new = (np.array([v is None for v in values[side]], dtype=bool) for side in SIDES)
    only_new, only_old = int((new & ~old).sum()), int((old & ~new).sum())
    p = float(mcnemar([[0, only_new], [only_old, 0]], exact=True).pvalue) if only_new or only_old else 1.0
    pairs = zip(*(values[side] for side in SIDES), strict=True)
    agree = [None not in (a, b) and comparable(contract, a) == comparable(contract, b) for a, b in pairs]
    rights = {n: right.value for n, line in enumerate(lines) if not (right := contract.parse(line.correction or "")).error}
    rows = {n: make_row(lines[n].input, contract.dump(v), id=lines[n].request_id, category="all") for n, v in rights.items()}
    scores = {side: [score_row(contract, row, own[n]) for n, row in rows.items()] for side, own in answers.items()}
    pair = paired(scores["candidate"], scores["current"], contract, settings) if rows else None
    limit, waits, sides = settings.task.target_latency_ms / 1000, {}, []
    for side, broken in zip(SIDES, (old, new), strict=True):
        p50, waits[side] = map(float, np.percentile([a.latency_s for a in answers[side]] or [0], [50, 95]))
        price = cost_per_1k(settings, Result(name=side, set="log", latency_p50_s=p50))
        sides.append({
            "model": side, "breaks the contract": int(broken.sum()),
            "of these, request failed": sum(a.finish_reason == "error" for a in answers[side]),
            "corrected requests right": f"{sum(s.exact for s in scores[side])} of {len(rows)}", "p50 (s)": f"{p50:.2f}",
            "p95 (s)": f"{waits[side]:.2f}", "cost per 1,000": "-" if price is None else f"{price:.4f}",
        })  # fmt: skip
    rules = {
        f"{len(lines)} requests are too few, {FEW} are needed": len(lines) < FEW,
        f"it breaks the contract where the current model does not {only_new} times, the reverse {only_old} times": only_new > only_old and p < 0.05,
        "it is worse on the corrected requests": pair is not None and pair.outcome == "worse",
        f"its p95 of {waits['candidate']:.2f} s is above the current model's and task.target_latency_ms": waits["candidate"] > max(limit, waits["current"]),
    }  # fmt: skip
    return {
        "requests": len(lines), "passed": not any(rules.values()), "why": [why for why, broken in rules.items() if broken],
        "sides": sides, "agreement": str(interval(agree, settings.evaluate.resamples, settings.evaluate.confidence)),
        "broken": {"only_candidate": only_new, "only_current": only_old, "mcnemar_p": p}, "metric": contract.primary_metric,
        "corrected": pair and pair.model_dump(),
        "differ": [{"request_id": line.request_id} for line, same in zip(lines, agree, strict=True) if not same],
    }  # fmt: skip


def read(contract: Contract, answer: Answer) -> dict | None:
    """The value of an answer that ended by itself and obeys the contract, else None."""
    parsed = contract.parse(answer.text)
    return parsed.value if answer.finish_reason == "stop" and not parsed.error else None
