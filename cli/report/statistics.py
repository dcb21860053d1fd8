"""How sure one is: intervals over seeds and prompts, and tests with seeds as the unit.

A result is a table of values with a row for each seed and a column for each test prompt. Both are samples: of the runs
that might have been, and of the prompts that might have been asked. NaN marks a value that is not there.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]


class Estimate(NamedTuple):
    """A mean and its 95 % interval, mean ± half_width."""

    mean: float
    half_width: float
    """NaN where nothing says how much the values scatter."""
    covers: str
    """What is taken for a sample: `seeds and prompts`, `seeds`, `prompts`, or nothing."""
    seeds: int
    prompts: int
    left_out: int
    """Values that are not there."""


def crossed_interval(values: Array) -> Estimate:
    """The mean over seeds and prompts, with an interval for other seeds *and* other prompts.

    The t interval over the seeds' means speaks of other seeds on the same prompts. It is widened by the prompts' own
    component of the variance in the two-way layout x = μ + seed + prompt + rest:
    half width² = t²(S − 1) MS_seeds / (S P) + t²(P − 1) max(MS_prompts − MS_rest, 0) / (S P). One seed says nothing of
    other seeds; then the interval is that of the prompts alone.

    Where values are missing, a seed's mean is that of what is there and its error is linearised: a missing value weighs
    nothing, the others of its row accordingly more.

    Args:
        values: (S, P), NaN where missing; a row of nothing else is no seed.

    References:
        | the layout and its components: Variance Components (Searle, Casella and McCulloch, 1992)
        | adding the parts of an interval in squares: Confidence Intervals on Nonnegative Linear Combinations of
          Variances (Graybill and Wang, 1980)

    Example:
        >>> found = crossed_interval(np.array([[1.0, 2.0, 6.0], [2.0, 3.0, 7.0]]))
        >>> round(found.mean, 2), round(found.half_width, 2), found.covers
        (3.5, 9.14, 'seeds and prompts')
    """
    seen = np.isfinite(values)
    left_out = int((~seen).sum())
    kept = seen.any(1)
    if not kept.any():
        return Estimate(math.nan, math.nan, "", 0, values.shape[1], left_out)
    seen, values = seen[kept], np.where(seen, values, 0.0)[kept]
    means = values.sum(1, keepdims=True) / seen.sum(1, keepdims=True)
    values = means + np.where(seen, values - means, 0.0) / seen.mean(1, keepdims=True)
    seeds, prompts = values.shape
    mean = float(values.mean())
    columns = values.mean(0, keepdims=True)
    rest = values - means - columns + mean
    squared = 0.0
    if seeds > 1:
        squared += _t(seeds - 1) ** 2 * float(((means - mean) ** 2).sum()) / ((seeds - 1) * seeds)
    if prompts > 1:
        own = float(((columns - mean) ** 2).sum()) / ((prompts - 1) * prompts)
        if seeds > 1:
            own -= float((rest**2).sum()) / ((seeds - 1) * (prompts - 1) * seeds * prompts)
        squared += _t(prompts - 1) ** 2 * max(own, 0.0)
    covers = " and ".join(name for name, size in (("seeds", seeds), ("prompts", prompts)) if size > 1)
    return Estimate(mean, math.sqrt(squared) if covers else math.nan, covers, seeds, prompts, left_out)


def _t(freedom: int) -> float:
    return float(stats.t.ppf(0.975, freedom))


class PairedTest(NamedTuple):
    """Do two methods differ, judged by the scatter of their difference from seed to seed?"""

    p: float
    """Of the paired t-test over seeds."""
    p_flip: float
    """Of the sign-flip permutation test; 2 / 2^n is the least that n seeds can give."""
    effect: float
    """Cohen's d_z: the mean difference over its standard deviation from seed to seed."""


def paired_test(differences: Array) -> PairedTest | None:
    """Test whether the mean difference is zero; None with fewer than three seeds, or without any scatter.

    Args:
        differences: one for each seed, over the same prompts.

    References:
        | d_z: Calculating and reporting effect sizes (Lakens, 2013), equation 6
        | the sign-flip test: The Design of Experiments (Fisher, 1935), section 21

    Example:
        >>> test = paired_test(np.array([0.1, 0.2, 0.3]))
        >>> [round(x, 3) for x in test]
        [0.074, 0.25, 2.0]
        >>> paired_test(np.array([0.1, 0.2])) is None
        True
    """
    spread = float(differences.std(ddof=1)) if len(differences) > 2 else 0.0
    if spread <= 1e-12 * float(np.abs(differences).max(initial=1.0)):
        return None
    flipped = stats.permutation_test((differences,), np.mean, permutation_type="samples", rng=0)
    p = stats.ttest_1samp(differences, 0.0).pvalue
    return PairedTest(float(p), float(flipped.pvalue), float(differences.mean()) / spread)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's correction: reject where the result is below α, and no more than α of the families have a false rejection.

    References:
        | A Simple Sequentially Rejective Multiple Test Procedure (Holm, 1979)

    Example:
        >>> [round(x, 3) for x in holm([0.01, 0.04, 0.03])]
        [0.03, 0.06, 0.06]
    """
    order = np.argsort(p)
    factors = np.arange(len(p), 0, -1)
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(np.maximum.accumulate(np.asarray(p)[order] * factors), 1.0)
    return [float(x) for x in corrected]
