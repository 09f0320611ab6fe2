"""Two models on the same rows: the paired difference, whether it is more than noise, and what changed."""

from collections.abc import Sequence

from pydantic import computed_field

from slm.contract import Contract
from slm.errors import SlmError
from slm.evaluate.intervals import Metric, percentile, resample
from slm.evaluate.metrics import Result, primary_statistic
from slm.evaluate.preference import Preference
from slm.evaluate.scorers import Score
from slm.rows import Record

FEW = 30  # below this many rows an interval that excludes zero is still no proof


class Comparison(Record):
    """Candidate against baseline. `difference` is candidate minus baseline in the primary metric; `mixed`: one side's
    decoding was held to the schema, the other's not; `preference`: what a judge says of a rewriting task's answers."""

    candidate: float
    baseline: float
    difference: Metric
    mcnemar_p: float
    fixed: list[str]
    broken: list[str]
    mixed: bool = False
    preference: Preference | None = None

    @computed_field
    @property
    def outcome(self) -> str:
        """ "better", "worse" or "no difference shown": by the interval, and only on 30 rows or more."""
        if self.difference.n < FEW or self.difference.low <= 0 <= self.difference.high:
            return "no difference shown"
        return "better" if self.difference.low > 0 else "worse"

    @computed_field
    @property
    def verdict(self) -> str:
        """The outcome for readers, who are told when the two sides did not decode alike."""
        return self.outcome + (" (constrained against unconstrained)" if self.mixed else "")


def compare_results(candidate: Result, baseline: Result, contract: Contract, settings) -> Comparison:
    """Compare two Results, as `paired` does their scores. Raises SlmError when one was not run, or they stand on other
    versions of a set or a contract."""
    alike([candidate, baseline], contract.schema_hash)
    found = paired(candidate.scores, baseline.scores, contract, settings)
    return found.model_copy(update={"mixed": candidate.constrained != baseline.constrained})


def alike(results: Sequence[Result], contract_hash: str) -> None:
    """Raises SlmError unless all were run, on one version of one set, under this version of the contract."""
    first = results[0]
    for other in results:
        names = f"{first.name} on {first.set} and {other.name} on {other.set}"
        if not other.ran:
            raise SlmError(f"{other.name} on {other.set} was not run ({other.reason}): there is nothing to compare.")
        if (first.set, first.set_hash) != (other.set, other.set_hash):
            hashes = f"{first.set_hash[:12] or 'no hash'} and {other.set_hash[:12] or 'no hash'}"
            raise SlmError(f"{names}: measured on different rows ({hashes}); run both again on today's set.")
        if {first.contract_hash, other.contract_hash} != {contract_hash}:
            hashes = f"{first.contract_hash} and {other.contract_hash}, now {contract_hash}"
            raise SlmError(f"{names}: measured under different contracts ({hashes}); run both again.")


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
    stat_a, stat_b = (primary_statistic(scores, contract.primary_metric) for scores in (a, b))
    whole, draws = np.arange(n)[None], resample(n, settings.evaluate.resamples)
    value_a, value_b = float(stat_a(whole)[0]), float(stat_b(whole)[0])
    fixed = [x.row_id for x, y in zip(a, b, strict=True) if x.exact and not y.exact]
    broken = [x.row_id for x, y in zip(a, b, strict=True) if y.exact and not x.exact]
    return Comparison(
        candidate=value_a, baseline=value_b, fixed=fixed, broken=broken,
        difference=percentile(value_a - value_b, stat_a(draws) - stat_b(draws), settings.evaluate.confidence, n),
        mcnemar_p=float(mcnemar([[0, len(fixed)], [len(broken), 0]], exact=True).pvalue) if fixed or broken else 1.0,
    )  # fmt: skip


def gap_closed(tuned: Result, base: Result, larger: Result, contract: Contract, settings) -> Metric | None:
    """(tuned - base) / (larger - base) in the primary metric with its paired bootstrap interval; 1: as good as the
    larger model. None when the larger one is not shown to be better than the base: there is no gap to close. Raises
    SlmError when the three do not stand on the same rows."""
    import numpy as np

    if compare_results(larger, base, contract, settings).outcome != "better":
        return None
    compare_results(tuned, base, contract, settings)
    by_id = ({s.row_id: s for s in r.scores} for r in (tuned, base, larger))
    ids, n = [s.row_id for s in tuned.scores], len(tuned.scores)
    t, b, g = (primary_statistic([own[i] for i in ids], contract.primary_metric) for own in by_id)
    whole, draws = np.arange(n)[None], resample(n, settings.evaluate.resamples)
    draws = draws[g(draws) > b(draws)]
    value, found = ((t(rows) - b(rows)) / (g(rows) - b(rows)) for rows in (whole, draws))
    return percentile(float(value[0]), found, settings.evaluate.confidence, n)


def seeds(results: Sequence[Result], confidence: float = 0.95) -> Metric:
    """The mean of the primary metric over runs that differ in their seed alone, with its t interval (n: runs), which
    says how far training varies; one run has its own interval. Raises SlmError when they stand on different rows."""
    import numpy as np
    from scipy.stats import sem, t

    alike(results, results[0].contract_hash)
    values = [next(iter(r.metrics.values())).value for r in results]
    if len(values) == 1 or np.ptp(values) == 0:
        return next(iter(results[0].metrics.values()))
    mean, reach = float(np.mean(values)), float(t.ppf((1 + confidence) / 2, len(values) - 1) * sem(values))
    return Metric(value=mean, low=max(0.0, mean - reach), high=min(1.0, mean + reach), n=len(values))


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
