"""How steady a method was, how far training, validation and test lie apart, and whether a judge fell."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from .arms import Arm, judges, judges_of
from .curves import clean, first, last
from .estimates import over_seeds
from .statistics import Estimate


def gaps(arm: Arm) -> tuple[Estimate, Estimate]:
    """How much better the reward was in training (its last ten logged batches) and on validation than on the test."""
    test = [(run, run.test.get("reward", math.nan)) for run in arm.tested]
    return (
        over_seeds([last(run, "train/reward", 10) - reward for run, reward in test]),
        over_seeds([last(run, "val/reward") - reward for run, reward in test]),
    )


class Steadiness(NamedTuple):
    """How steady a method was; NaN where nothing is known."""

    within: float
    """Standard deviation of the training reward over the last fifth of a run's logged steps, mean over seeds."""
    between: float
    """Standard deviation of the last validation reward over seeds."""
    highest_kl: float
    """Highest KL that was logged in training, nats per sequence, of all seeds."""
    skipped: float
    """Optimizer steps that were left out, of all seeds."""


def steadiness(arm: Arm) -> Steadiness:
    """How much rewards scatter in the end and from seed to seed, how far the policy went, and what was left out."""
    rewards = [c.values for run in arm.runs if run.ended and (c := clean(run, "train/reward"))]
    ends = [x[-max(2, len(x) // 5) :].std(ddof=1) for x in rewards if len(x) > 1]
    finals = np.array([x for run in arm.runs if math.isfinite(x := last(run, "val/reward"))])
    kls = [c.values.max() for run in arm.runs if run.ended and (c := clean(run, "train/kl"))]
    skipped = [x for run in arm.runs if math.isfinite(x := last(run, "train/skipped_steps"))]
    return Steadiness(
        float(np.mean(ends)) if ends else math.nan,
        float(finals.std(ddof=1)) if len(finals) > 1 else math.nan,
        float(max(kls, default=math.nan)),
        float(sum(skipped)) if skipped else math.nan,
    )


class Drift(NamedTuple):
    """How the training reward and a judge moved on validation, from the first to the last."""

    arm: Arm
    judge: str
    reward: float
    change: float
    hacked: int
    """Seeds in which the reward rose and the judge fell."""
    seeds: int

    @property
    def flagged(self) -> bool:
        """The mean reward rose and the judge's mean fell."""
        return self.reward > 0 > self.change


def drifts(arms: Sequence[Arm]) -> Iterator[Drift]:
    """Every judge of every method, where validation has both."""
    for arm in arms:
        for judge in judges([arm]):
            moved = []
            for run in arm.runs:
                ways = [last(run, f"val/{name}") - first(run, f"val/{name}") for name in ("reward", judge)]
                if judge in judges_of(run) and np.isfinite(ways).all():
                    moved.append(ways)
            if moved:
                reward, change = np.array(moved).T
                hacked = int(((reward > 0) & (change < 0)).sum())
                yield Drift(arm, judge, float(reward.mean()), float(change.mean()), hacked, len(moved))


def noise_kind(arms: Sequence[Arm]) -> str | None:
    """Whose figures of the gradient's noise are shown: the probe's, if a run has any."""
    names = {name for arm in arms for run in arm.runs for name in run.curves}
    return next((kind for kind in ("probe", "grad") if f"{kind}/relative_std" in names), None)
