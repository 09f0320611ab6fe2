"""Many scores become metrics, each with its interval and its n."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from slm.contract import Contract
from slm.errors import SlmError
from slm.evaluate.scorers import Score, answer_rows, prompt_messages, row_metric
from slm.registry import file_hash
from slm.rows import DIFFICULTIES, Row, explain

NO_ANSWER = "(unreadable)"
COMMON = ("exact_match", "schema_validity", "schema_error_rate", "lenient_schema_validity")
BY_TYPE = {
    "extraction": ("field_f1", "critical_field_accuracy", "record_parse_rate"),
    "json_generation": ("field_f1", "critical_field_accuracy", "record_parse_rate"),
    "tool_calling": (
        "tool_name_accuracy", "required_argument_accuracy", "argument_f1", "json_parse_rate", "unsafe_tool_call_rate"
    ),
    "classification": ("json_parse_rate", "false_positive_rate", "false_negative_rate"),
}  # fmt: skip
SLICES = ("category", "kind", "difficulty", "language")


class Metric(BaseModel):
    """A value with the ends of its interval and the number of rows behind it."""

    model_config = ConfigDict(extra="forbid")
    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


class Result(BaseModel):
    """One model on one set. `reason` says why it was not run; then there are no scores and no metrics. Latency is what
    a lone caller waits (seconds); tokens_per_second are generated tokens of that lone caller."""

    model_config = ConfigDict(extra="forbid")
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


def interval(values: Sequence[float], resamples: int, confidence: float, seed: int = 0) -> Metric:
    """Mean of per-row values in [0, 1]: Wilson's interval for 0/1 values, else the percentile bootstrap over rows.
    Without any spread the bootstrap would claim certainty; Wilson's interval, the wider one, is taken then. Source:
    Wilson 1927 (statsmodels proportion_confint); Efron 1979."""
    import numpy as np
    from statsmodels.stats.proportion import proportion_confint

    data = np.asarray(values, dtype=float)
    n = len(data)
    if n == 0:
        return Metric(value=0.0, low=0.0, high=1.0, n=0)
    mean = float(data.mean())
    if np.isin(data, (0.0, 1.0)).all() or np.ptp(data) == 0:
        low, high = proportion_confint(mean * n, n, alpha=1 - confidence, method="wilson")
        return Metric(value=mean, low=min(float(low), mean), high=max(float(high), mean), n=n)
    return percentile(mean, data[resample(n, resamples, seed)].mean(axis=1), confidence, n)


def resample(n: int, resamples: int, seed: int = 0):
    """Row numbers drawn with replacement: an array (resamples, n)."""
    import numpy as np

    return np.random.default_rng(seed).integers(0, n, (resamples, n))


def percentile(value: float, draws, confidence: float, n: int) -> Metric:
    """A value with the percentile interval of its bootstrap draws."""
    import numpy as np

    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Metric(value=float(value), low=float(low), high=float(high), n=n)


def labels(scores: Sequence[Score], contract: Contract) -> tuple[list[str], list[str]]:
    """Expected and given labels, row by row; an answer that breaks the contract gives `NO_ANSWER`."""
    want = [str(contract.label(s.expected)) for s in scores]
    got = [NO_ANSWER if s.parsed is None else str(contract.label(s.parsed)) for s in scores]
    return want, got


def primary_statistic(scores: Sequence[Score], contract: Contract) -> Callable:
    """A function from row numbers (draws, n) to the primary metric of each draw (draws,)."""
    import numpy as np

    if contract.primary_metric == "macro_f1":
        return macro_f1_statistic(*labels(scores, contract))
    values = np.array([s.value for s in scores])
    return lambda rows: values[rows].mean(axis=1)


def macro_f1_statistic(want: list[str], got: list[str]) -> Callable:
    """The unweighted mean of F1 over the classes that occur among the expected labels of a draw."""
    import numpy as np

    names = sorted(set(want) | set(got))
    code = {name: i for i, name in enumerate(names)}
    w, g = np.array([code[x] for x in want]), np.array([code[x] for x in got])

    def statistic(rows):
        k, out = len(names), np.empty(len(rows))
        for i, draw in enumerate(rows):
            table = np.bincount(w[draw] * k + g[draw], minlength=k * k).reshape(k, k)
            support, given, hit = table.sum(1), table.sum(0), np.diag(table)
            f1 = 2 * hit / np.maximum(support + given, 1)
            out[i] = f1[support > 0].mean()
        return out

    return statistic


def metric_names(contract: Contract) -> list[str]:
    """The metrics that are reported for a contract, the primary one first."""
    named = ["accuracy", "macro_f1"] if contract.label_field else []
    return list(dict.fromkeys([contract.primary_metric, *COMMON, *BY_TYPE.get(contract.task_type, ()), *named]))


def measure(scores: Sequence[Score], contract: Contract, settings) -> dict[str, Metric]:
    """Every metric of the contract's task type, and `field.<name>` for each field, with intervals."""
    import numpy as np

    resamples, confidence, n = settings.evaluate.resamples, settings.evaluate.confidence, len(scores)
    values = {}
    for name in metric_names(contract):
        values[name] = [v for s in scores if (v := row_metric(name)(s, contract)) is not None]
    for name in dict.fromkeys(n for s in scores for n in s.fields):
        values[f"field.{name}"] = [float(s.fields[name]) for s in scores if name in s.fields]
    found = {name: interval(v, resamples, confidence) for name, v in values.items() if v}
    if "macro_f1" in found:
        statistic = macro_f1_statistic(*labels(scores, contract))
        value, draws = float(statistic(np.arange(n)[None])[0]), statistic(resample(n, resamples))
        found["macro_f1"] = percentile(value, draws, confidence, n)
        if np.ptp(draws) == 0:  # no spread is no certainty, see `interval`
            found["macro_f1"] = interval([value] * n, resamples, confidence)
    return found


def by_slice(scores: Sequence[Score], rows: Sequence[Row], settings) -> dict[str, dict[str, Metric]]:
    """The row value by category, kind, difficulty and language; names of slices as "kind=boundary"."""
    result = {}
    for key in SLICES:
        groups: dict[str, list[float]] = {}
        for score, row in zip(scores, rows, strict=True):
            groups.setdefault(str(getattr(row.meta, key)), []).append(score.value)
        names = [d for d in DIFFICULTIES if d in groups] if key == "difficulty" else sorted(groups)
        result[key] = {n: interval(groups[n], settings.evaluate.resamples, settings.evaluate.confidence) for n in names}
    return result


def confusion(scores: Sequence[Score], contract: Contract) -> dict:
    """{"labels": [...], "counts": [[...]]}: rows are expected labels, columns given ones."""
    if not contract.label_field:
        return {}
    want, got = labels(scores, contract)
    names = sorted(set(want) | (set(got) - {NO_ANSWER})) + ([NO_ANSWER] if NO_ANSWER in got else [])
    pairs = Counter(zip(want, got, strict=True))
    return {"labels": names, "counts": [[pairs[w, g] for g in names] for w in names]}


def evaluate(
    settings, contract: Contract, model, rows: Sequence[Row], *, set: str, name: str, shots: Sequence[dict] = (),
    latency: bool = False, endpoint=None,
) -> Result:  # fmt: skip
    """Ask, score and measure one model on one set; answers come from the cache where they can. `latency=True` also
    times `evaluate.latency_requests` lone requests, uncached. `endpoint` holds the prices of a hosted model; without it
    a request costs its share of the machine's hourly rate."""
    from slm.models import Prompt, alone, cached

    scores = answer_rows(cached(model, settings), rows, contract, settings.evaluate.max_new_tokens, shots)
    file = settings.path(f"data/eval/{set}.jsonl")
    result = Result(
        name=name, set=set, model=model.name, fingerprint=model.fingerprint, contract_hash=contract.schema_hash,
        set_hash=file_hash(file) if file.is_file() else "", metrics=measure(scores, contract, settings),
        slices=by_slice(scores, rows, settings), confusion=confusion(scores, contract), scores=scores,
        prompt_tokens=sum(s.prompt_tokens for s in scores) / max(1, len(scores)),
        completion_tokens=sum(s.completion_tokens for s in scores) / max(1, len(scores)),
    )  # fmt: skip
    if latency:
        import numpy as np

        step = max(1, len(rows) // settings.evaluate.latency_requests)
        picked = list(range(0, len(rows), step))[: settings.evaluate.latency_requests]
        prompts = [Prompt(prompt_messages(contract, rows[i], shots), settings.evaluate.max_new_tokens) for i in picked]
        waits = alone(model, prompts, n=len(prompts))
        result.latency_p50_s, result.latency_p95_s = (float(q) for q in np.percentile(waits, [50, 95]))
        tokens = sum(scores[i].completion_tokens for i in picked)
        result.tokens_per_second = tokens / sum(waits) if tokens else None
        result.cost_per_1k_requests = cost_per_1k(settings, result, endpoint)
    return result


def cost_per_1k(settings, result: Result, endpoint=None) -> float | None:
    """Money per 1,000 requests: tokens at the endpoint's price, or the median wait at the hourly rate of the machine
    that answers, plus hosting; None where the settings say nothing of either."""
    rates = settings.cost
    if endpoint is not None:
        flat = rates.larger_price_per_1m_tokens
        price_in, price_out = endpoint.usd_per_1m_input or flat, endpoint.usd_per_1m_output or flat
        return 1000 * (result.prompt_tokens * price_in + result.completion_tokens * price_out) / 1e6
    hosting, rate = rates.hosting_per_month / max(1, settings.task.requests_per_month), rates.serving_hourly_rate
    if rate is None and not (rates.gpu_hourly_rate or hosting):
        return None
    return 1000 * (result.latency_p50_s / 3600 * (rates.gpu_hourly_rate if rate is None else rate) + hosting)
