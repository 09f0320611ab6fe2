"""A figure with its interval: Wilson's, the bootstrap's, and metrics of the whole confusion matrix."""

from collections.abc import Callable, Sequence

from slm.rows import Record


class Metric(Record):
    """A value with the ends of its interval and the number of rows behind it."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def interval(values: Sequence[float], resamples: int, confidence: float, weights: Sequence[float] | None = None) -> Metric:
    """Mean of per-row values: Wilson's interval for 0/1 values, else the percentile bootstrap over rows. With `weights`
    (all above 0) sum(values) / sum(weights), a micro average. Without any spread the bootstrap would claim certainty,
    and Wilson's interval, the wider one, is taken. Source: Wilson 1927 (statsmodels proportion_confint); Efron 1979."""
    import numpy as np
    from statsmodels.stats.proportion import proportion_confint

    data, n = np.asarray(values, dtype=float), len(values)
    whole = np.ones(n) if weights is None else np.asarray(weights, dtype=float)
    if n == 0:
        return Metric(value=0.0, low=0.0, high=1.0, n=0)
    mean = float(data.sum() / whole.sum())
    yes_or_no = np.isin(data, (0.0, 1.0)).all() and (whole == 1).all()
    if 0 <= mean <= 1 and (yes_or_no or np.ptp(data / whole) == 0):
        low, high = proportion_confint(mean * n, n, alpha=1 - confidence, method="wilson")
        return Metric(value=mean, low=min(float(low), mean), high=max(float(high), mean), n=n)
    rows = resample(n, resamples)
    return percentile(mean, data[rows].sum(axis=1) / whole[rows].sum(axis=1), confidence, n)


def resample(n: int, resamples: int):
    """Row numbers drawn with replacement: an array (resamples, n)."""
    import numpy as np

    return np.random.default_rng(0).integers(0, n, (resamples, n))


def percentile(value: float, draws, confidence: float, n: int) -> Metric:
    """A value with the percentile interval of its bootstrap draws, which holds the value itself."""
    import numpy as np

    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Metric(value=float(value), low=min(float(low), value), high=max(float(high), value), n=n)


# Metrics that need the whole confusion matrix: functions of hits, expected and given counts, each (draws, classes). The
# mean is over the classes that occur among the expected labels of a draw; rates are of each class against the rest.
TABLES: dict[str, Callable] = {
    "macro_f1": lambda hit, want, got: 2 * hit / (want + got).clip(1),
    "false_positive_rate": lambda hit, want, got: (got - hit) / (want.sum(1, keepdims=True) - want).clip(1),
    "false_negative_rate": lambda hit, want, got: 1 - hit / want.clip(1),
}


def table_statistic(labels: Sequence[tuple[str, str]], name: str = "macro_f1") -> Callable:
    """A function from row numbers (draws, n) to a metric of TABLES of each draw (draws,). `labels`: expected, given."""
    import numpy as np

    names = sorted({label for pair in labels for label in pair})
    k, code = len(names), {label: i for i, label in enumerate(names)}
    cells = np.array([code[want] * k + code[got] for want, got in labels])

    def statistic(rows):
        flat = cells[rows] + np.arange(len(rows))[:, None] * k * k
        table = np.bincount(flat.ravel(), minlength=len(rows) * k * k).reshape(-1, k, k)
        want, got, hit = table.sum(2), table.sum(1), np.diagonal(table, axis1=1, axis2=2)
        return (TABLES[name](hit, want, got) * (want > 0)).sum(1) / (want > 0).sum(1)

    return statistic
