"""One method less another, and whether that is more than chance."""

import math
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from .arms import Arm, trained_on
from .estimates import same_prompts, test_values
from .statistics import Estimate, PairedTest, crossed_interval, holm, paired_test


class Difference(NamedTuple):
    """One method less another on the same prompts, or why that cannot be said."""

    measure: str
    first: Arm
    second: Arm
    estimate: Estimate | None
    test: PairedTest | None
    p: float
    """Of the t-test, Holm-corrected over the pairs of this measure; NaN without a test."""
    why_not: str

    @property
    def significant(self) -> bool:
        """By the corrected test, and the interval for other seeds and prompts does not reach zero."""
        e = self.estimate
        return e is not None and self.p < 0.05 and abs(e.mean) > e.half_width


def differences(arms: Sequence[Arm], name: str, beta: float | None = None) -> list[Difference]:
    """All pairs of methods by a figure, if it is a judge of those not trained on it; p is corrected over them."""
    judged = [arm for arm in arms if not trained_on(arm, name)]
    found = [_difference(one, two, name, beta) for one, two in combinations(judged, 2)]
    corrected = iter(holm([d.test.p for d in found if d.test]))
    return [d._replace(p=next(corrected)) if d.test else d for d in found]


def _difference(first: Arm, second: Arm, name: str, beta: float | None) -> Difference:
    other = {run.seed: run for run in second.tested}
    both = [(run, other[run.seed]) for run in first.tested if run.seed in other]
    pairs = [pair for pair in both if all(run.rows is not None for run in pair)]
    estimate, test, why = None, None, ""
    if not both:
        why = "no seed was tested with both"
    elif not pairs or not same_prompts([run for pair in pairs for run in pair]):
        why = "the prompts differ or are not known: not paired"
    else:
        gaps = np.stack([test_values(one, name, beta) - test_values(two, name, beta) for one, two in pairs])
        estimate = crossed_interval(gaps)
        by_seed = np.array([row[np.isfinite(row)].mean() for row in gaps if np.isfinite(row).any()])
        test = paired_test(by_seed)
        if test is None:
            counts = {
                0: "no prompt was scored with both",
                1: "one seed: no test is possible",
                2: "two seeds: no test is made",
            }
            why = counts.get(len(by_seed), "no scatter between seeds: no test")
    return Difference(name, first, second, estimate, test, math.nan, why)
