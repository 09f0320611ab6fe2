"""Many scores become metrics, each with its interval and its n."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from slm import cost
from slm.contract import Contract
from slm.errors import SlmError
from slm.evaluate.calibration import ece_statistic, reliability, sureness
from slm.evaluate.intervals import TABLES, Metric, interval, percentile, resample, table_statistic
from slm.evaluate.scorers import NO_ANSWER, Score, answer_rows, metric_names, prompt_messages
from slm.registry import file_hash
from slm.rows import DIFFICULTIES, Record, Row, explain

SLICES = ("category", "kind", "difficulty", "language")
MUCH = 0.05  # a larger share of answers that are cut off, or repeat the prompt, gets a warning


class Result(Record):
    """One model on one set. `reason` says why it was not run; then there are no scores and no metrics. Latency is what
    a lone caller waits (seconds); tokens_per_second are generated tokens of that lone caller."""

    name: str
    set: str
    reason: str = ""
    model: str = ""
    fingerprint: str = ""
    set_hash: str = ""
    contract_hash: str = ""
    metrics: dict[str, Metric] = {}
    slices: dict[str, dict[str, Metric]] = {}
    confusion: dict = {}
    latency_p50_s: float | None = None
    latency_p95_s: float | None = None
    tokens_per_second: float | None = None
    cost_per_1k_requests: float | None = None
    latency_p99_s: float | None = None
    first_token_s: float | None = None
    memory_mb: float | None = None
    constrained: bool = False
    calibration: dict = {}
    warnings: list[str] = []
    prompt_tokens: float = 0.0
    completion_tokens: float = 0.0
    scores: list[Score] = []

    @property
    def ran(self) -> bool:
        """Whether there is anything to compare."""
        return not self.reason


def read_results(file: Path, stage: str) -> list[Result]:
    """The results that a file holds. Raises SlmError that names the file and the stage to run again."""
    try:
        body = json.loads(file.read_text(encoding="utf-8"))
        return [Result.model_validate(r) for r in (body["results"] if isinstance(body, dict) else body)]
    except ValueError as error:
        raise SlmError(f"{file}: {explain(error)}; run {stage} again.") from None


def parts(scores: Sequence[Score], name: str):
    """A metric's shares as two arrays, sum(first) / sum(second) being its value; 0 and 0 where a row says nothing.
    Scores without shares give the value of each row."""
    import numpy as np

    shares = [s.shares.get(name, (0.0, 0.0) if s.shares else s.value) for s in scores]
    return np.array([s if isinstance(s, tuple) else (s, 1.0) for s in shares], dtype=float).reshape(-1, 2).T


def primary_statistic(scores: Sequence[Score], name: str) -> Callable:
    """A function from row numbers (draws, n) to the primary metric of each draw (draws,)."""
    if name in TABLES and all(s.labels for s in scores):
        return table_statistic([s.labels for s in scores], name)
    hits, whole = parts(scores, name)
    return lambda rows: hits[rows].sum(axis=1) / whole[rows].sum(axis=1).clip(1e-12)


def measure(scores: Sequence[Score], contract: Contract, settings) -> dict[str, Metric]:
    """Every metric of the contract's task type, the primary one first; `constraint.<name>` and `field.<name>`; `ece`
    and `brier` where answers carry probabilities; with intervals. What no row says anything about is left out."""
    import numpy as np

    resamples, confidence, found = settings.evaluate.resamples, settings.evaluate.confidence, {}

    def over_all(statistic: Callable, n: int) -> Metric:
        value, draws = float(statistic(np.arange(n)[None])[0]), statistic(resample(n, resamples))
        if not np.ptp(draws):  # no spread is no certainty
            return interval([value] * n, resamples, confidence)
        return percentile(value, draws, confidence, n)

    constraints = dict.fromkeys(n for s in scores for n in s.shares if n.startswith("constraint."))
    for name in [*metric_names(contract), *constraints] if scores else []:
        hits, whole = parts(scores, name)
        # Without a null label, false positives and negatives are each class against the rest.
        if contract.label_field and name in TABLES and (name == "macro_f1" or contract.null_label is None):
            found[name] = over_all(table_statistic([s.labels for s in scores], name), len(scores))
        elif whole.any():
            found[name] = interval(hits[whole > 0], resamples, confidence, weights=whole[whole > 0])
    for name in dict.fromkeys(n for s in scores for n in s.fields):
        right = [float(s.fields[name]) for s in scores if name in s.fields]
        found[f"field.{name}"] = interval(right, resamples, confidence)
    sure, right = sureness(scores, contract)
    if len(sure):
        found["ece"] = over_all(ece_statistic(sure, right), len(sure))
        found["brier"] = interval((sure - right) ** 2, resamples, confidence)
    return found


def by_slice(scores: Sequence[Score], rows: Sequence[Row], contract: Contract, settings) -> dict[str, dict]:
    """The primary metric by category, kind, difficulty and language: {"kind": {"boundary": Metric}}."""
    import numpy as np

    result, (hits, whole), own = {}, parts(scores, contract.primary_metric), settings.evaluate
    for key in SLICES:
        names = np.array([str(getattr(row.meta, key)) for row in rows])
        order = [d for d in DIFFICULTIES if d in names] if key == "difficulty" else sorted(set(names.tolist()))
        of = {name: (names == name) & (whole > 0) for name in order}
        how = {"resamples": own.resamples, "confidence": own.confidence}
        result[key] = {name: interval(hits[i], weights=whole[i], **how) for name, i in of.items() if i.any()}
    return result


def suspicions(scores: Sequence[Score]) -> list[str]:
    """What makes a result doubtful, a sentence each: collapse, echo, endless generation, failed requests."""
    n, found = len(scores), []
    expected, given = (Counter(s.labels[i] for s in scores if s.labels) for i in (0, 1))
    label, count = max(given.items(), key=lambda item: (item[0] != NO_ANSWER, item[1]), default=("", 0))
    if n > 1 and len({s.text for s in scores}) == 1 and len({json.dumps(s.expected) for s in scores}) > 1:
        found.append(f"collapse: one and the same output for all {n} rows, {scores[0].text[:60]!r}.")
    elif count > max(0.9 * n, 1.5 * expected[label]):
        found.append(f"collapse: the label {label} on {count} of {n} rows; {expected[label]} rows have it.")
    for name, text in (
        ("echo_rate", "echo: {} of {} answers repeat the prompt, or a part of it, and nothing else."),
        ("endless_rate", "endless: {} of {} answers did not stop within evaluate.max_new_tokens and are cut off."),
        ("error_rate", "errors: {} of {} requests failed and count as wrong."),
    ):
        bad = int(parts(scores, name)[0].sum())
        if bad > (0 if name == "error_rate" else MUCH * n):
            found.append(text.format(bad, n))
    return found


def confusion(scores: Sequence[Score]) -> dict:
    """{"labels": [...], "counts": [[...]]}: rows are expected labels, columns given ones; {} without labels."""
    pairs = Counter(s.labels for s in scores if s.labels)
    names = sorted({label for pair in pairs for label in pair}, key=lambda label: (label == NO_ANSWER, label))
    return {"labels": names, "counts": [[pairs[w, g] for g in names] for w in names]} if pairs else {}


def evaluate(
    settings, contract: Contract, model, rows: Sequence[Row], *, set: str, name: str, shots: Sequence[dict] = (),
    latency: bool = False, endpoint=None, constrained: bool = False,
) -> Result:  # fmt: skip
    """Ask, score and measure one model on one set; answers come from the cache where they can. `latency=True` also
    times `evaluate.latency_requests` lone requests, uncached. `endpoint` holds the prices of a hosted model; without it
    a request costs its share of the machine's hourly rate. `constrained`: decoding is held to the contract's schema.
    A rewriting task is scored by the rubric too, where `evaluate.judge` is set."""
    from slm.evaluate.preference import add_rubric
    from slm.models import Prompt, alone, cached

    schema, most = contract.schema if constrained else None, settings.evaluate.max_new_tokens
    scores = answer_rows(cached(model, settings), rows, contract, most, shots, schema)
    if contract.task_type == "rewriting" and settings.evaluate.judge.url:
        add_rubric(settings, contract, rows, scores)
    file, n = settings.path(f"data/eval/{set}.jsonl"), max(1, len(scores))
    result = Result(
        name=name, set=set, model=model.name, fingerprint=model.fingerprint, contract_hash=contract.schema_hash,
        set_hash=file_hash(file) if file.is_file() else "", metrics=measure(scores, contract, settings),
        slices=by_slice(scores, rows, contract, settings), confusion=confusion(scores), scores=scores,
        constrained=constrained, calibration=reliability(scores, contract),
        warnings=[] if name == "majority" else suspicions(scores),
        prompt_tokens=sum(s.prompt_tokens for s in scores) / n,
        completion_tokens=sum(s.completion_tokens for s in scores) / n,
    )  # fmt: skip
    if latency:
        import numpy as np

        step = max(1, len(rows) // settings.evaluate.latency_requests)
        picked = rows[::step][: settings.evaluate.latency_requests]
        prompts = [Prompt(prompt_messages(contract, row, shots), most, schema) for row in picked]
        answers = alone(model, prompts, n=len(prompts))
        cost.answered(settings, model, answers, sum(a.latency_s for a in answers))
        waits, tokens = [a.latency_s for a in answers], sum(a.completion_tokens for a in answers)
        firsts = [a.first_token_s for a in answers if a.first_token_s is not None]
        result.first_token_s = float(np.median(firsts)) if firsts else None
        quantiles = map(float, np.percentile(waits, [50, 95, 99]))
        result.latency_p50_s, result.latency_p95_s, result.latency_p99_s = quantiles
        result.tokens_per_second = tokens / sum(waits) if tokens else None
        result.memory_mb = getattr(model, "memory_mb", None)  # a program or an endpoint has none
        result.cost_per_1k_requests = cost_per_1k(settings, result, endpoint)
    return result


def cost_per_1k(settings, result: Result, endpoint=None) -> float | None:
    """Money per 1,000 requests: tokens at the endpoint's price, or the median wait at the hourly rate of the machine
    that answers, plus hosting; None where the settings say nothing of either."""
    rates = settings.cost
    if endpoint is not None:
        flat = rates.larger_price_per_1m_tokens
        price_in, price_out = endpoint.usd_per_1m_input or flat, endpoint.usd_per_1m_output or flat
        money = 1000 * (result.prompt_tokens * price_in + result.completion_tokens * price_out) / 1e6
        return money if price_in or price_out else None
    hosting, rate = rates.hosting_per_month / max(1, settings.task.requests_per_month), rates.serving_hourly_rate
    if result.latency_p50_s is None or rate is None and not (rates.gpu_hourly_rate or hosting):
        return None
    return 1000 * (result.latency_p50_s / 3600 * (rates.gpu_hourly_rate if rate is None else rate) + hosting)
