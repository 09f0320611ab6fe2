"""Canary: a share of the customers gets the candidate; looked at as often as you like, it is rolled back or promoted."""

import json
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from slm import registry
from slm.contract import Contract
from slm.curate.plots import BLUE, figure, save
from slm.errors import SlmError
from slm.evaluate.compare import FEW
from slm.production.logs import LogLine, read_logs
from slm.production.shadow import SIDES, arm, released
from slm.rows import explain, write_json
from slm.sections import Canary

SHARES = {"rolled back": 0.0, "not decided": 0.0, "promoted": 1.0}
Paths = dict[str, list[tuple[str, bool]]]  # outcome -> the customers as they came: side, failed


class Router(BaseModel):
    """client/router.json, which the client reads at every request: a customer gets the `candidate` (its contract.json)
    when sha256(salt:group) falls into `share`. `current`: the model_version of the others. `alpha`: the chance of a
    wrong decision. A request above `slow_s` seconds is slow."""

    model_config = ConfigDict(extra="forbid")
    run_id: str
    status: Literal["running", "rolled back", "promoted", "not decided"] = "running"
    share: float
    salt: str
    since: datetime
    current: str
    candidate: dict
    plan: Canary
    alpha: float
    slow_s: float


def bounds(failures, n, alpha: float) -> list:
    """The ends of the intervals that hold a failure rate at every n at once with probability 1 - alpha: all p with
    B(k + 1/2, n - k + 1/2) / (B(1/2, 1/2) p^k (1 - p)^(n - k)) < 1 / alpha. That beta mixture of likelihood ratios is a
    martingale (Robbins 1970) and ever reaches 1 / alpha with probability alpha at most (Ville 1939); as a confidence
    sequence in Howard, Ramdas, McAuliffe & Sekhon 2021. For independent requests and a rate that stays as it is."""
    import numpy as np
    from scipy.special import betaln, xlog1py, xlogy

    k, n = np.asarray(failures, dtype=float), np.asarray(n, dtype=float)
    level, ends = betaln(k + 0.5, n - k + 0.5) - betaln(0.5, 0.5) + np.log(alpha), []
    for edge in (0.0, 1.0):
        outside, inside = np.full_like(k, edge), k / n.clip(1)
        for _ in range(40):  # bisection
            middle = (outside + inside) / 2
            held = xlogy(k, middle) + xlog1py(n - k, -middle) > level
            inside, outside = np.where(held, middle, inside), np.where(held, outside, middle)
        ends.append(outside)
    return ends


def start(settings, run_id: str) -> Router:
    """Begin: write the router file. Raises SlmError without a passed shadow of this release, and while another canary
    runs."""
    release, passed = released(settings, run_id), registry.latest(settings, "runs", stage="shadow", run_id=run_id) or {}
    if not passed.get("passed") or passed["release"] != release["hash"]:
        raise SlmError(f"run {run_id} has not passed a shadow since its release; python -m slm shadow {run_id} comes first.")
    with registry.locked(settings, "canary"):
        if _file(settings).is_file() and (other := load(settings)).status == "running":
            raise SlmError(f"{_file(settings)}: a canary of run {other.run_id} is running; delete the file to stop it.")
        where = "{url}#{model}".format(**passed["candidate"])
        router = Router(
            run_id=run_id, share=settings.production.canary.share, salt=secrets.token_hex(8), since=datetime.now(UTC),
            current=passed["current"]["version"], candidate=arm(settings, run_id, where),
            plan=settings.production.canary, alpha=1 - settings.evaluate.confidence, slow_s=settings.task.target_latency_ms / 1000,
        )  # fmt: skip
        if router.current == router.candidate["version"]:
            raise SlmError(f"both models are {router.current!r} in the log; their lines cannot be told apart.")
        registry.append(settings, "runs", {"stage": "canary", "decision": "started", **router.model_dump(exclude={"candidate"})})
        write_json(_file(settings), router.model_dump(mode="json"))
    return router


def check(settings, contract: Contract, now: datetime | None = None) -> tuple[Router, list[str], list[dict], Paths]:
    """Look at the log and act: a decision changes the router file in one step. Returns the router, notes, the table and
    the customers as they came; nothing of the last two when all was decided before. Raises SlmError without a canary."""
    with registry.locked(settings, "canary"):
        router = load(settings)
        if router.status != "running":
            return router, [], [], {}
        logs = read_logs(settings.path(settings.production.logs))
        decision, notes, table, paths = judge(router, contract, logs.lines, now or datetime.now(UTC))
        lost = {"torn or invalid lines": len(logs.problems), "requests without consent": logs.no_consent, "lines that the logger lost": logs.dropped}
        notes += [f"not counted: {count} {what}" for what, count in lost.items() if count]
        if decision != "running":
            router = router.model_copy(update={"status": decision, "share": SHARES[decision]})
            write_json(_file(settings), router.model_dump(mode="json"))
            facts = {"run_id": router.run_id, "decision": decision, "why": notes, "table": table}
            registry.append(settings, "runs", {"stage": "canary", **facts})
    return router, notes, table, paths


def judge(
    router: Router, contract: Contract, lines: Sequence[LogLine], now: datetime
) -> tuple[str, list[str], list[dict], Paths]:  # fmt: skip
    """Decide from the lines since the start. A customer counts once, by the first request: requests of one customer
    resemble one another. "wrong" is unreadable or corrected, once `plan.settle_hours` have passed. Rolled back when an
    outcome is certainly more frequent than under the current model; promoted when none can have risen by `plan.margin`
    and `plan.days` are over; not decided when `plan.most` customers of the candidate have settled by then. Each of the six rates has a sixth of alpha
    (Bonferroni): however often one looks, the chance of a wrong decision is alpha at most."""
    sides, plan, first = dict(zip((router.current, router.candidate["version"]), SIDES, strict=True)), router.plan, {}
    since = [line for line in sorted(lines, key=lambda line: line.time) if line.time >= router.since]
    for line in since:
        if line.model_version in sides:
            first.setdefault(line.group or line.request_id, line)
    came = [(sides[line.model_version], line) for line in first.values()]
    settled = [(side, line) for side, line in came if line.time <= now - timedelta(hours=plan.settle_hours)]
    paths = {
        "unreadable": [(side, not line.parse_ok) for side, line in came],
        "slow": [(side, line.latency_s > router.slow_s) for side, line in came],
        "wrong": [(side, _wrong(contract, line)) for side, line in settled],
    }
    table, worse, notes, good = [], [], [], (over := now - router.since >= timedelta(days=plan.days))
    for name, path in paths.items():
        own = {side: [bad for one, bad in path if one == side] for side in SIDES}
        low, high = bounds([*map(sum, own.values())], [*map(len, own.values())], router.alpha / 6)
        worse += [f"{name}: certainly more often than under the current model"] if low[1] > high[0] else []
        good = good and high[1] - low[0] < plan.margin
        told = {side: f"{sum(bad)} of {len(bad)}: {100 * low[i]:.1f} to {100 * high[i]:.1f} %" for i, (side, bad) in enumerate(own.items())}
        table.append({"outcome": name, **told, "rise (points)": f"{100 * (low[1] - high[0]):+.1f} to {100 * (high[1] - low[0]):+.1f}"})
    if other := sorted({line.model_version for line in since} - {*sides}):
        notes.append(f"not counted: requests of other versions, {', '.join(other)}")
    notes += [f"no request of {version!r} yet" for version, side in sides.items() if side not in dict(came)]
    new, done = (sum(side == "candidate" for side, _ in part) for part in (came, settled))
    low, high = bounds(new, len(came), 0.001)
    if not low <= plan.share <= high:
        good = False
        notes.append(f"{new} of {len(came)} customers got the candidate, planned are {plan.share:.0%}: is every request routed and logged?")
    decision = "rolled back" if worse else "promoted" if good else "not decided" if over and done >= plan.most else "running"
    return decision, worse + notes, table, paths


def needed(router: Router, rate: float, canaries: int = 200) -> list[dict]:
    """How many customers of the candidate a decision takes where the current model fails at `rate` and the candidate more
    often: simulated (seeded) for one outcome, the median and what 90 % of the canaries need at most."""
    import numpy as np

    rng, plan, table = np.random.default_rng(0), router.plan, []
    n = np.unique(np.geomspace(1, plan.most, 100).astype(int))
    others = np.maximum(1, n * (1 - plan.share) / plan.share).astype(int)
    for rise in (0.0, 0.05, 0.1, 0.2):
        arms = ((rate, others), (min(1.0, rate + rise), n))
        failed = [rng.binomial(np.diff(at, prepend=0), p, (canaries, len(at))).cumsum(axis=1) for p, at in arms]
        (low, high), (new_low, new_high) = (bounds(k, at, router.alpha / 6) for k, (_, at) in zip(failed, arms, strict=True))
        hits = {"rolled back": new_low > high, "promoted": new_high - low < plan.margin}
        when = {what: np.where(hit.any(1), n[hit.argmax(1)], 2 * plan.most) for what, hit in hits.items()}
        what = "promoted" if (when["promoted"] < when["rolled back"]).mean() > 0.5 else "rolled back"
        told = [f"{x:,.0f}" if x <= plan.most else f"over {plan.most:,}" for x in np.quantile(when[what], [0.5, 0.9])]
        table.append({"candidate fails more often by": f"{100 * rise:.0f} points", "is": what, "after customers of its own (median)": told[0], "9 of 10 by": told[1]})
    return table


def failing(settings, contract: Contract, router: Router) -> float:
    """The share of the current model's requests in the log that are wrong; 0.05 while there are fewer than 30."""
    own = [line for line in read_logs(settings.path(settings.production.logs)).lines if line.model_version == router.current]
    return sum(_wrong(contract, line) for line in own) / len(own) if len(own) >= FEW else 0.05


def plot(paths: Paths, alpha: float, path: Path) -> Path:
    """Per outcome: each model's rate so far with its confidence sequence, over the customers as they came."""
    import numpy as np

    drawn, panels = figure(7, 7, nrows=len(paths), sharex=True)
    for axes, (name, came) in zip(panels, paths.items(), strict=True):
        x = np.unique(np.linspace(1, max(1, len(came)), 400).astype(int))
        for side, color in zip(SIDES, ("#4a5568", BLUE), strict=True):
            n, k = np.array([(one == side, one == side and bad) for one, bad in came] or [(0, 0)]).cumsum(axis=0)[x - 1].T
            axes.fill_between(x, *bounds(k, n, alpha), color=color, alpha=0.25, lw=0)
            axes.plot(x, np.where(n, k / n.clip(1), np.nan), color=color, label=side)
        axes.set(title=name, ylabel="share", ylim=(0, 1), xlim=(0, x[-1]))
    axes.set_xlabel("customers of both models, as they came")
    drawn.suptitle("Lines: share so far. Bands: where the rate lies, however often one looks.", fontsize=10)
    drawn.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return save(drawn, path)


def load(settings) -> Router:
    """The router file. Raises SlmError when it is missing or torn."""
    try:
        return Router.model_validate(json.loads(_file(settings).read_text(encoding="utf-8")))
    except OSError:
        raise SlmError(f"{_file(settings)}: there is no canary; python -m slm canary start RUN") from None
    except ValueError as error:
        mend = "delete it, then everybody gets the current model, and start the canary again"
        raise SlmError(f"{_file(settings)}: torn, or changed by hand ({explain(error)}); {mend}.") from None


def _file(settings) -> Path:
    return settings.path(settings.production.router)


def _wrong(contract: Contract, line: LogLine) -> bool:
    """Whether an answer could not be read, or a person gave another; one that repeats it confirms it."""
    if line.correction is None or not line.parse_ok:
        return not line.parse_ok
    return contract.parse(line.correction).value != contract.parse(line.output).value
