"""Intervals: how sure one is of a statistic of independent units.

Letters in shapes: n units.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Interval(NamedTuple):
    """An estimate and where the truth lies with a given probability."""

    estimate: Tensor
    low: Tensor
    high: Tensor


def student_quantile(level: float, freedom: int) -> float:
    """Half-width, in standard errors, of an interval of this level from `freedom` degrees of freedom.

    Exact for 1 and 2, from the Cornish–Fisher expansion for more (below 0.5 % off at 95 %).

    Example:
        >>> [round(student_quantile(0.95, f), 2) for f in (1, 2, 3, 10, 1000)]
        [12.71, 4.3, 3.18, 2.23, 1.96]
    """
    if freedom == 1:
        return math.tan(math.pi * level / 2)
    if freedom == 2:
        return level * math.sqrt(2 / (1 - level**2))
    z = float(torch.special.ndtri(torch.tensor((1 + level) / 2, dtype=torch.float64)))
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return float(z + sum(term / freedom**i for i, term in enumerate(terms, start=1)))


def jackknife(statistic: Callable[[Tensor], Tensor], units: int, level: float = 0.95) -> Interval:
    """Interval of a smooth function of averages, by leaving out one unit at a time; around the plain estimate.

    Args:
        statistic: maps the indices of the units to count (at least n − 1 of them) to a tensor of any shape.
        units: independent units, n.
        level: probability of the interval, by Student's t with n − 1 degrees of freedom.

    References:
        | Bias and Confidence in Not Quite Large Samples (Tukey, 1958)

    Example:
        >>> data = torch.tensor([1.0, 2.0, 3.0])
        >>> [round(float(x), 3) for x in jackknife(lambda rows: data[rows].mean(), 3)]
        [2.0, -0.484, 4.484]
    """
    estimate, values = statistic(torch.arange(units)), pseudo_values(statistic, units)
    half = student_quantile(level, units - 1) * values.std(0) / math.sqrt(units)
    return Interval(estimate, estimate - half, estimate + half)


def pseudo_values(statistic: Callable[[Tensor], Tensor], units: int) -> Tensor:
    """Tukey's pseudo-values, (n, …): n times the whole less n − 1 times what is left without one unit.

    They can be treated as n independent observations of the statistic.

    Example:
        >>> data = torch.tensor([1.0, 2.0, 3.0])
        >>> pseudo_values(lambda rows: data[rows].mean(), 3)
        tensor([1., 2., 3.])
    """
    if units < 2:
        raise ValueError(f"units = {units}: an interval needs 2 or more")
    every = torch.arange(units)
    without = torch.stack([statistic(every[every != unit]) for unit in range(units)])
    return units * statistic(every) - (units - 1) * without


def ratio_interval(above: Float[Tensor, " n"], below: Float[Tensor, " n"], level: float = 0.95) -> Interval:
    """Interval of a ratio of means, both uncertain and correlated, for a ratio that is not negative.

    The set of all θ for which mean(above − θ below) is not significantly different from 0. Where the mean of `below`
    is not significantly above 0, it has no upper end: infinity. Where that mean is not even positive, the
    estimate is NaN. The ends are not below 0, the estimate may be.

    Args:
        above: observations of the numerator, one for each independent unit; pseudo-values count as such.
        below: and of the denominator.
        level: probability of the interval.

    References:
        | Some Problems in Interval Estimation (Fieller, 1954)

    Example:
        >>> [round(float(x), 3) for x in ratio_interval(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 2.0, 2.0]))]
        [1.0, 0.0, 2.242]
        >>> [float(x) for x in ratio_interval(torch.tensor([1.0, 2.0]), torch.tensor([1.0, -3.0]))]
        [nan, 0.0, inf]
    """
    n = len(above)
    a, b = float(above.double().mean()), float(below.double().mean())
    low, high = 0.0, math.inf
    if n < 2:
        low = high = math.nan
    elif b > 0:
        spread = torch.stack([above, below]).double().cov() * student_quantile(level, n - 1) ** 2 / n
        (aa, ab), (_, bb) = spread.tolist()
        # (a − θ b)² ≤ aa − 2 θ ab + θ² bb
        lead, middle, rest = b**2 - bb, a * b - ab, a**2 - aa
        discriminant = middle**2 - lead * rest
        if lead > 0:
            root = math.sqrt(max(discriminant, 0.0))
            low, high = (middle - root) / lead, (middle + root) / lead
        elif lead < 0 and discriminant > 0:  # all but what lies between two values
            first, second = sorted((middle + sign * math.sqrt(discriminant)) / lead for sign in (-1, 1))
            low = second if first < 0 else 0.0
    ends = (
        a / b if b > 0 else math.nan,
        low if math.isnan(low) else max(low, 0.0),
        high if math.isnan(high) else max(high, 0.0),
    )
    return Interval(*(torch.tensor(x, dtype=torch.float64) for x in ends))
