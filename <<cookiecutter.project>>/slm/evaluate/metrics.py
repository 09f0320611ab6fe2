"""Many scores become metrics, each with its interval and its n."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from slm.contract import Contract
from slm.errors import SlmError
from slm.evaluate.calibration import ece_statistic, reliability, sureness
from slm.evaluate.scorers import Score, answer_rows, prompt_messages, row_metric
from slm.registry import file_hash
from slm.rows import DIFFICULTIES, Row, explain

NO_ANSWER = "(unreadable)"
COMMON = (
    "exact_match", "lenient_exact_match", "schema_validity", "schema_error_rate", "lenient_schema_validity", "error_rate",
    "endless_rate", "echo_rate",
)  # fmt: skip
FIELDWISE = (
    "field_f1",
    "field_precision",
    "field_recall",
    "field_micro_f1",
    "critical_field_accuracy",
    "exact_key_match",
)
BY_TYPE = {
    "extraction": (*FIELDWISE, "record_parse_rate"),
    "json_generation": (*FIELDWISE, "json_parse_rate", "record_parse_rate"),
    "tool_calling": (
        "tool_name_accuracy", "required_argument_accuracy", "argument_f1", "argument_accuracy", "json_parse_rate",
        "unsafe_tool_call_rate", "executable_success",
    ),
    "classification": ("json_parse_rate", "false_positive_rate", "false_negative_rate"),
    "rewriting": ("constraint_pass_rate", "rubric_score"),
    "qa": ("answer_correctness", "answer_f1", "citation_support", "citation_recall", "hallucination_rate"),
    "review": (
        "issue_f1", "issue_precision", "issue_recall", "false_positive_rate", "severity_accuracy", "severity_error",
        "severity_bias",
    ),
    "planning": ("step_validity", "step_recall", "tool_sequence_accuracy", "execution_success"),
    "safety": ("violation_recall", "false_refusal_rate", "jailbreak_resistance"),
}  # fmt: skip
FEW_ENDLESS = 0.05  # more answers than this that hit max_new_tokens, or repeat the prompt, get a warning
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


def interval(
    values: Sequence[float], resamples: int, confidence: float, seed: int = 0, weights: Sequence[float] | None = None
) -> Metric:
    """Mean of per-row values: Wilson's interval for 0/1 values, else the percentile bootstrap over rows. With `weights`
    (all above 0) sum(values) / sum(weights): a micro average. Without any spread the bootstrap would claim certainty;
    Wilson's interval, the wider one, is taken then. Source: Wilson 1927 (statsmodels proportion_confint); Efron 1979."""
    import numpy as np
    from statsmodels.stats.proportion import proportion_confint

    data, whole = (
        np.asarray(values, dtype=float),
        np.asarray([1.0] * len(values) if weights is None else weights, dtype=float),
    )
    n = len(data)
    if n == 0:
        return Metric(value=0.0, low=0.0, high=1.0, n=0)
    mean, single = float(data.sum() / whole.sum()), data / whole
    if 0 <= mean <= 1 and ((np.isin(data, (0.0, 1.0)).all() and (whole == 1).all()) or np.ptp(single) == 0):
        low, high = proportion_confint(mean * n, n, alpha=1 - confidence, method="wilson")
        return Metric(value=mean, low=min(float(low), mean), high=max(float(high), mean), n=n)
    rows = resample(n, resamples, seed)
    return percentile(mean, data[rows].sum(axis=1) / whole[rows].sum(axis=1), confidence, n)


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


def parts(scores: Sequence[Score], contract: Contract, name: str):
    """A metric's shares as two arrays, sum(first) / sum(second) being its value; 0 and 0 where a row says nothing."""
    import numpy as np

    shares = [row_metric(name)(score, contract) for score in scores]
    pairs = [s if isinstance(s, tuple) else (0.0, 0.0) if s is None else (s, 1.0) for s in shares]
    return np.array(pairs, dtype=float).reshape(-1, 2).T


def primary_statistic(scores: Sequence[Score], contract: Contract) -> Callable:
    """A function from row numbers (draws, n) to the primary metric of each draw (draws,)."""
    import numpy as np

    if contract.primary_metric in TABLES:
        return table_statistic(*labels(scores, contract), contract.primary_metric)
    hits, whole = parts(scores, contract, contract.primary_metric)
    return lambda rows: hits[rows].sum(axis=1) / np.maximum(whole[rows].sum(axis=1), 1e-12)


# Metrics that need the whole confusion matrix: functions of hits, expected and given counts, each (draws, classes). The
# mean is over the classes that occur among the expected labels of a draw; rates are of each class against the rest.
TABLES: dict[str, Callable] = {
    "macro_f1": lambda hit, want, got: 2 * hit / (want + got).clip(1),
    "false_positive_rate": lambda hit, want, got: (got - hit) / (want.sum(1, keepdims=True) - want).clip(1),
    "false_negative_rate": lambda hit, want, got: 1 - hit / want.clip(1),
}


def table_statistic(want: list[str], got: list[str], name: str = "macro_f1") -> Callable:
    """A function from row numbers (draws, n) to a metric of TABLES of each draw (draws,)."""
    import numpy as np

    names = sorted({*want, *got})
    k, code = len(names), {label: i for i, label in enumerate(names)}
    cells = np.array([code[w] * k + code[g] for w, g in zip(want, got, strict=True)])

    def statistic(rows):
        found = []
        for part in np.array_split(rows, -(-len(rows) // 100)):
            flat = cells[part] + np.arange(len(part))[:, None] * k * k
            table = np.bincount(flat.ravel(), minlength=len(part) * k * k).reshape(-1, k, k)
            want, got, hit = table.sum(2), table.sum(1), np.diagonal(table, axis1=1, axis2=2)
            there = want > 0
            found.append((TABLES[name](hit, want, got) * there).sum(1) / there.sum(1))
        return np.concatenate(found)

    return statistic


def metric_names(contract: Contract) -> list[str]:
    """The metrics that are reported for a contract, the primary one first."""
    named = ["accuracy", "macro_f1"] if contract.label_field else []
    return list(dict.fromkeys([contract.primary_metric, *COMMON, *BY_TYPE.get(contract.task_type, ()), *named]))


def measure(scores: Sequence[Score], contract: Contract, settings) -> dict[str, Metric]:
    """Every metric of the contract's task type, `constraint.<name>` for each constraint and `field.<name>` for each
    field, and `ece` and `brier` where answers carry probabilities; with intervals. A metric that no row says anything
    about is left out."""
    import numpy as np

    resamples, confidence, n = settings.evaluate.resamples, settings.evaluate.confidence, len(scores)
    # Without a null label the rates of a classification are the mean over its classes.
    tables = {"macro_f1"} | ({"false_positive_rate", "false_negative_rate"} if contract.null_label is None else set())
    tables = tables & TABLES.keys() if contract.label_field else set()
    found: dict[str, Metric] = {}

    def over_all(name: str, statistic: Callable, n: int) -> None:
        value, draws = float(statistic(np.arange(n)[None])[0]), statistic(resample(n, resamples))
        # No spread is no certainty, see `interval`.
        found[name] = (
            percentile(value, draws, confidence, n) if np.ptp(draws) else interval([value] * n, resamples, confidence)
        )

    own = [name for name in dict.fromkeys(n for s in scores for n in s.shares) if name.startswith("constraint.")]
    for name in [*metric_names(contract), *own] if n else []:
        if name in tables:
            over_all(name, table_statistic(*labels(scores, contract), name), n)
            continue
        hits, whole = parts(scores, contract, name)
        if whole.any():
            found[name] = interval(hits[whole > 0], resamples, confidence, weights=whole[whole > 0])
    for name in dict.fromkeys(n for s in scores for n in s.fields):
        right = [float(s.fields[name]) for s in scores if name in s.fields]
        found[f"field.{name}"] = interval(right, resamples, confidence)
    sure, right = sureness(scores, contract)
    if sure:
        over_all("ece", ece_statistic(sure, right), len(sure))
        found["brier"] = interval([(c - r) ** 2 for c, r in zip(sure, right, strict=True)], resamples, confidence)
    return found


def by_slice(
    scores: Sequence[Score], rows: Sequence[Row], contract: Contract, settings
) -> dict[str, dict[str, Metric]]:
    """The primary metric by category, kind, difficulty and language: {"kind": {"boundary": Metric}}."""
    result, (hits, whole), own = {}, parts(scores, contract, contract.primary_metric), settings.evaluate
    for key in SLICES:
        groups: dict[str, list[int]] = {}
        for i, row in enumerate(rows):
            if whole[i]:
                groups.setdefault(str(getattr(row.meta, key)), []).append(i)
        names = [d for d in DIFFICULTIES if d in groups] if key == "difficulty" else sorted(groups)
        result[key] = {
            n: interval(hits[groups[n]], own.resamples, own.confidence, weights=whole[groups[n]]) for n in names
        }
    return result


def suspicions(scores: Sequence[Score], contract: Contract) -> list[str]:
    """What makes a result doubtful, a sentence each: collapse, echo, endless generation, failed requests."""
    n, found = len(scores), []
    expected = Counter(str(contract.label(s.expected)) for s in scores)
    given = Counter(
        str(contract.label(s.lenient_parsed)) for s in scores if contract.label(s.lenient_parsed) is not None
    )
    label, count = given.most_common(1)[0] if given else ("", 0)
    if n > 1 and len({s.text for s in scores}) == 1 and len({json.dumps(s.expected) for s in scores}) > 1:
        found.append(f"collapse: one and the same output for all {n} rows, {scores[0].text[:60]!r}.")
    elif len(expected) > 1 and count / n > max(0.9, 1.5 * expected[label] / n):
        found.append(f"collapse: the label {label} on {count} of {n} rows; {expected[label]} rows have it.")
    for name, text in (
        ("echo_rate", "echo: {} of {} answers repeat the prompt or stand in it."),
        ("endless_rate", "endless: {} of {} answers did not stop before evaluate.max_new_tokens; they are cut off."),
        ("error_rate", "errors: {} of {} requests failed and count as wrong; the score is that of the endpoint too."),
    ):
        bad = int(parts(scores, contract, name)[0].sum())
        if bad > (0 if name == "error_rate" else FEW_ENDLESS * n):
            found.append(text.format(bad, n))
    return found


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
        slices=by_slice(scores, rows, contract, settings), confusion=confusion(scores, contract), scores=scores,
        constrained=constrained, calibration=reliability(scores, contract),
        warnings=[] if name == "majority" else suspicions(scores, contract),
        prompt_tokens=sum(s.prompt_tokens for s in scores) / n, completion_tokens=sum(s.completion_tokens for s in scores) / n,
    )  # fmt: skip
    if latency:
        import numpy as np

        step = max(1, len(rows) // settings.evaluate.latency_requests)
        picked = rows[::step][: settings.evaluate.latency_requests]
        prompts = [Prompt(prompt_messages(contract, row, shots), most, schema) for row in picked]
        answers = alone(model, prompts, n=len(prompts))
        waits, firsts = (
            [a.latency_s for a in answers],
            [a.first_token_s for a in answers if a.first_token_s is not None],
        )
        result.latency_p50_s, result.latency_p95_s, result.latency_p99_s = map(
            float, np.percentile(waits, [50, 95, 99])
        )
        result.first_token_s = float(np.median(firsts)) if firsts else None
        tokens = sum(a.completion_tokens for a in answers)
        result.tokens_per_second = tokens / sum(waits) if tokens else None
        result.memory_mb = getattr(model, "memory_mb", None)  # programs and endpoints have none
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
