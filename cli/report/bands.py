"""Curves over the seeds of a method, and when they reached a reward."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .arms import Arm
from .curves import clean, gap, position
from .runs import Curve
from .statistics import Array


class Band(NamedTuple):
    """A curve over seeds, at the validations that all of them have: the mean is of the same seeds everywhere."""

    x: Array
    mean: Array
    low: Array
    """The lowest seed's value."""
    high: Array


def band(arm: Arm, name: str, axis: str) -> Band | None:
    """Mean and range of a curve over the seeds that have it; None where none has."""
    curves = [(run, curve) for run in arm.runs if (curve := clean(run, name))]
    return _band([(curve, x) for run, curve in curves if (x := position(run, curve, axis)) is not None])


def gap_band(arm: Arm) -> Band | None:
    """Training reward less validation reward along the training, against steps."""
    curves = [curve for run in arm.runs if (curve := gap(run))]
    return _band([(curve, curve.steps) for curve in curves])


def _band(curves: Sequence[tuple[Curve, Array]]) -> Band | None:
    columns = []
    for curve, x in curves:
        rows = zip(curve.steps, x, curve.values, strict=True)
        columns.append({step: pair for step, *pair in rows if math.isfinite(pair[0])})
    shared = sorted(set(columns[0]).intersection(*columns[1:])) if columns else []
    if not shared:
        return None
    x, y = np.array([[column[step] for step in shared] for column in columns]).transpose(2, 0, 1)
    return Band(x.mean(0), y.mean(0), y.min(0), y.max(0))


def coarse(band: Band, points: int = 40) -> Band:
    """No more than so many points, each the mean of neighbours."""
    groups = np.array_split(np.arange(len(band.x)), min(points, len(band.x)))
    return Band(*(np.array([values[group].mean() for group in groups]) for values in band))


def levels(arms: Sequence[Arm]) -> list[float]:
    """Rewards worth asking for: parts of the way from where validation began to the best mean.

    They have two digits of that way, and lie on it.
    """
    bands = [found for arm in arms if (found := band(arm, "val/reward", "steps"))]
    if not bands:
        return []
    start, best = max(float(b.mean[0]) for b in bands), max(float(b.mean.max()) for b in bands)
    if best <= start:
        return []
    decimals = 1 - math.floor(math.log10(best - start))
    rounded = (round(start + part * (best - start), decimals) for part in (0.25, 0.5, 0.75, 0.9))
    return list(dict.fromkeys(level for level in rounded if start < level <= best))


def reached(arm: Arm, level: float, axis: str) -> str:
    """Where the validation reward first was at a level, from the first seed to the last, and how many got there.

    Not known is what a log that ends too early leaves open.
    """
    found: list[float] = []
    known = 0
    for run in arm.runs:
        curve = clean(run, "val/reward")
        x = None if curve is None else position(run, curve, axis)
        if curve is None or x is None:
            continue
        first = x[curve.values >= level][:1]
        known += run.ended and not np.isnan(first).any()
        found += first[~np.isnan(first)].tolist()
    if not found and known:
        return "not reached" + ("" if known == len(arm.runs) else f" by {known} of {len(arm.runs)} seeds")
    if not found:
        return "not known"
    span = f"{min(found):,.0f}" + (f" … {max(found):,.0f}" if max(found) > min(found) else "")
    return span if len(found) == len(arm.runs) else f"{span} ({len(found)} of {len(arm.runs)} seeds)"
