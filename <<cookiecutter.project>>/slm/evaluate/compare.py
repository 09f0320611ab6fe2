"""Two models on the same rows: the paired difference, whether it is more than noise, and what changed."""

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, computed_field

from slm.contract import Contract
from slm.errors import SlmError
from slm.evaluate.metrics import Metric, percentile, primary_statistic, resample
from slm.evaluate.scorers import Score

FEW = 30  # below this many rows an interval that excludes zero is still no proof


class Comparison(BaseModel):
    """Candidate against baseline. `difference` is candidate minus baseline in the primary metric."""

    model_config = ConfigDict(extra="forbid")
    candidate: float
    baseline: float
    difference: Metric
    mcnemar_p: float
    fixed: list[str]
    broken: list[str]

    @computed_field
    @property
    def verdict(self) -> str:
        """ "better", "worse" or "no difference shown": by the interval, and only on 30 rows or more."""
        if self.difference.n < FEW or self.difference.low <= 0 <= self.difference.high:
            return "no difference shown"
        return "better" if self.difference.low > 0 else "worse"


def paired(candidate: Sequence[Score], baseline: Sequence[Score], contract: Contract, settings) -> Comparison:
    """Compare two score lists of the same rows, in any order. The difference of the primary metric has a paired
    bootstrap interval (Efron & Tibshirani 1993, ch. 16); exact match has McNemar's exact test (McNemar 1947); `fixed`
    and `broken` are row ids by exact match. Raises SlmError when the rows, or their expected answers, are not the
    same."""
    import numpy as np
    from statsmodels.stats.contingency_tables import mcnemar

    other = {s.row_id: s for s in baseline}
    odd = {s.row_id for s in candidate} ^ other.keys()
    if odd or len(candidate) != len(baseline) or not candidate:
        named = ", ".join(sorted(odd)[:3]) or "none, or one id twice"
        raise SlmError(f"a comparison needs the same rows on both sides; not shared: {named}. Run both on one set.")
    a, b = list(candidate), [other[s.row_id] for s in candidate]
    for x, y in zip(a, b, strict=True):
        if x.expected != y.expected:
            raise SlmError(f"row {x.row_id}: its expected answer changed between the two runs; run 02_baseline again.")
    n = len(a)
    stat_a, stat_b = primary_statistic(a, contract), primary_statistic(b, contract)
    whole, draws = np.arange(n)[None], resample(n, settings.evaluate.resamples)
    value_a, value_b = float(stat_a(whole)[0]), float(stat_b(whole)[0])
    fixed = [x.row_id for x, y in zip(a, b, strict=True) if x.exact and not y.exact]
    broken = [x.row_id for x, y in zip(a, b, strict=True) if y.exact and not x.exact]
    return Comparison(
        candidate=value_a, baseline=value_b, fixed=fixed, broken=broken,
        difference=percentile(value_a - value_b, stat_a(draws) - stat_b(draws), settings.evaluate.confidence, n),
        mcnemar_p=float(mcnemar([[0, len(fixed)], [len(broken), 0]], exact=True).pvalue) if fixed or broken else 1.0,
    )  # fmt: skip


def detectable_difference(n: int, spread: float = 0.4, confidence: float = 0.95, power: float = 0.8) -> float:
    """The smallest paired difference that n rows show with this power: (z_conf + z_power) * spread / sqrt(n). `spread`
    is the standard deviation of the per-row differences. Source: the sample size of a paired t-test."""
    from scipy.stats import norm

    return float((norm.ppf((1 + confidence) / 2) + norm.ppf(power)) * spread / max(1, n) ** 0.5)


def spread(a: Sequence[Score], b: Sequence[Score]) -> float:
    """The standard deviation of the per-row differences of two score lists of the same rows."""
    import numpy as np

    other = {s.row_id: s.value for s in b}
    return float(np.std([s.value - other[s.row_id] for s in a]))
