"""The curves of one run."""

import math

import numpy as np

from .runs import Curve, Run
from .statistics import Array

AXES = {
    "steps": "optimizer steps",
    "train/sampled_tokens": "sampled tokens",
    "train/reward_calls": "reward calls",
    "seconds": "seconds",
}
"""What a learning curve is drawn against."""


def clean(run: Run, name: str) -> Curve | None:
    """A curve without the points that are not finite; None where nothing is left."""
    curve = run.curves.get(name)
    if curve is None or not (ok := np.isfinite(curve.values)).any():
        return None
    return Curve(curve.steps[ok], curve.values[ok], curve.seconds[ok])


def position(run: Run, curve: Curve, axis: str) -> Array | None:
    """Where the points of a validation curve lie on an axis; None where nothing was logged.

    Counts are taken between two logs in proportion to the steps. What lies beyond the last log is NaN; run.json may say
    what was spent in the end. At step 0, where validation begins, nothing is spent.
    """
    found: Array
    if axis in ("steps", "seconds"):
        found = getattr(curve, axis)
        return found
    counts = clean(run, axis)
    if counts is None:
        return None
    steps, values = [-1.0, *counts.steps], [0.0, *counts.values]
    spent = run.about.get("spent")
    total = spent.get(axis.removeprefix("train/")) if isinstance(spent, dict) else None
    if run.ended and curve.steps[-1] > steps[-1] and isinstance(total, (int, float)):
        steps, values = [*steps, curve.steps[-1]], [*values, total]
    at = np.where(curve.steps == 0, -1, curve.steps)
    at = np.where(at == steps[-1] + 1, steps[-1], at)  # the validation at the end carries the number of steps
    found = np.interp(at, steps, values, right=math.nan)
    return found


def gap(run: Run) -> Curve | None:
    """Mean training reward since the validation before, less validation reward; None where either is absent."""
    train, val = clean(run, "train/reward"), clean(run, "val/reward")
    if train is None or val is None:
        return None
    since = zip([-1.0, *val.steps], val.steps, strict=False)
    parts = [train.values[(train.steps > low) & (train.steps <= high) & (high > 0)] for low, high in since]
    kept = [i for i, part in enumerate(parts) if len(part)]
    if not kept:
        return None
    return Curve(val.steps[kept], np.array([parts[i].mean() - val.values[i] for i in kept]), val.seconds[kept])


def joined(run: Run, *names: str) -> Array:
    """Step and value of several curves, a row for each step that all of them have; none where one is absent."""
    tables = [dict(zip(c.steps, c.values, strict=True)) for name in names if (c := run.curves.get(name)) is not None]
    if len(tables) < len(names):
        return np.empty((0, len(names) + 1))
    shared = sorted(set(tables[0]).intersection(*tables[1:]))
    return np.array([[step, *(table[step] for table in tables)] for step in shared]).reshape(-1, len(names) + 1)


def last(run: Run, name: str, points: int = 1) -> float:
    """Mean of the last points of a curve that are finite; NaN where none is, or the log ends before the run did."""
    curve = run.curves.get(name)
    values = np.empty(0) if curve is None or not run.ended else curve.values[-points:]
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else math.nan


def end(run: Run) -> tuple[float, float]:
    """KL and reward of a run's last validation; NaN where they are not known."""
    return last(run, "val/kl"), last(run, "val/reward")


def first(run: Run, name: str) -> float:
    """The first point of a curve, where there are more; NaN where there are not."""
    curve = run.curves.get(name)
    return float(curve.values[0]) if curve is not None and len(curve.values) > 1 else math.nan
