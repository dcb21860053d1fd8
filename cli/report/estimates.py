"""Test figures over seeds and prompts."""

import math
from collections.abc import Sequence

import numpy as np

from .arms import Arm
from .runs import Run
from .statistics import Array, Estimate, crossed_interval

PLAIN = ("perplexity", "distinct_2", "response_length", "eos_rate", "entropy")
"""Test metrics that are shown as means over seeds."""


def measure(arm: Arm, name: str, beta: float | None = None) -> Estimate:
    """A test figure over seeds and prompts; over seeds alone where the prompts are not the same."""
    runs = arm.tested
    if not runs:
        return Estimate(math.nan, math.nan, "", 0, 0, 0)
    if name in PLAIN:
        return crossed_interval(np.array([[run.test.get(name, math.nan)] for run in runs]))
    measured = [(run, x) for run in runs if np.isfinite(x := test_values(run, name, beta)).any()]
    if not measured:
        return Estimate(math.nan, math.nan, "", 0, 0, 0)
    runs, values = [run for run, _ in measured], [x for _, x in measured]
    if same_prompts(runs):
        return crossed_interval(np.stack(values))
    found = crossed_interval(np.array([[x[np.isfinite(x)].mean()] for x in values]))
    return found._replace(left_out=sum(int((~np.isfinite(x)).sum()) for x in values))


def over_seeds(values: Sequence[float]) -> Estimate:
    """Mean and t interval of one number for each seed."""
    return crossed_interval(np.array([values], float).T)


def same_prompts(runs: Sequence[Run]) -> bool:
    """Whether all of them were tested on the same prompts, and these are known."""
    known = [run.rows.prompts for run in runs if run.rows is not None]
    return len(known) == len(runs) and all(prompts == known[0] for prompts in known)


def test_values(run: Run, name: str, beta: float | None) -> Array:
    """A figure of each test prompt; of the whole test where there are no prompts."""
    if name == "objective":
        return test_values(run, "reward", None) - (beta or 0.0) * test_values(run, "kl", None)
    if run.rows is None:
        return np.array([run.test.get(name, math.nan)])
    return run.rows.figures.get(name, np.full(len(run.rows.prompts), math.nan))
