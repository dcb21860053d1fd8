"""What is missing for a comparison."""

import math
from collections.abc import Collection, Iterator, Sequence

import numpy as np

from .arms import Arm, judges
from .curves import AXES, clean, end, position
from .estimates import PLAIN, measure, same_prompts


def absent(arms: Sequence[Arm], planned: Collection[str] = ()) -> list[str]:
    """What is missing for a comparison although each run is sound; seeds only of methods that are not `planned`."""
    seeds = set().union(*(arm.seeds for arm in arms))
    logged = {name for arm in arms for run in arm.runs for name in run.curves}
    return [
        f"{arm.label}: {line}."
        for arm in arms
        for line in _absent(arm, set() if arm.method in planned else seeds, logged)
    ]


def _absent(arm: Arm, seeds: set[int], logged: set[str]) -> Iterator[str]:
    if lost := sorted(seeds - set(arm.seeds)):
        yield f"no finished run with seed {', '.join(map(str, lost))}, which others have"
    if not arm.tested:
        yield "no finished run was tested; it is not among the test results"
    elif len(arm.tested) < len(arm.runs):
        yield f"{len(arm.tested)} of {len(arm.runs)} finished runs count in the test results"
    if len(arm.tested) > 1 and not same_prompts(arm.tested):
        yield "its runs' test prompts differ or are not known: its interval covers seeds alone"
    for name in ("reward", "kl", *judges([arm]), *PLAIN):
        found, tested = measure(arm, name), len(arm.tested)
        if 0 < found.seeds < tested:
            yield f"{name} was measured on the test in {found.seeds} of {tested} runs; it is of those"
        elif found.left_out and name not in PLAIN:
            yield f"{found.left_out} values of {name} on the test are null or not finite; left out"
    if beyond := [str(run.seed) for run in arm.runs if not all(map(math.isfinite, end(run)))]:
        yield f"where it ended in reward and KL on validation is not known of seed {', '.join(beyond)}"
    curves = [curve for run in arm.runs if (curve := clean(run, "val/reward"))]
    if len(curves) < len(arm.runs):
        yield f"{len(curves)} of {len(arm.runs)} runs have a validation curve; the mean is of those"
    if len({tuple(curve.steps) for curve in curves}) > 1:
        yield "its runs were validated at different steps; curves show those they share"
    for axis in [axis for axis in AXES if axis in logged]:
        if (known := sum(axis in run.curves for run in arm.runs)) < len(arm.runs):
            yield f"{known} of {len(arm.runs)} runs logged their {AXES[axis]}; the curve against them is of those"
        places = [position(run, c, axis) for run in arm.runs if (c := clean(run, "val/reward"))]
        if any(x is not None and np.isnan(x).any() for x in places):
            yield f"{AXES[axis]} were not logged up to the last validation; it is not drawn against them"
