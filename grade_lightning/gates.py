"""Gates: the coefficient of A ∇log π of each token, as a function of the experience."""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from grade_lightning.functional.advantages import Total, alone
from grade_lightning.functional.decoupled import hardness
from grade_lightning.functional.gates import clipped
from grade_lightning.functional.probability_bounds import probability_bounds
from grade_lightning.functional.ratios import standardised_ratio
from grade_lightning.records import Experience

Gate: TypeAlias = Callable[[Tensor, Experience], Tensor]
"""(ratio, experience) → coefficient ≥ 0; ratio (B, T). It may look at advantages, old log-probabilities, turns …"""


def by_advantage(gate: Callable[..., Tensor], **settings: Any) -> Gate:
    """A gate of :mod:`grade_lightning.functional.gates`, which looks at the ratio and the advantage alone.

    Args:
        gate: the function.
        **settings: its further arguments, such as bounds.

    Example:
        >>> from grade_lightning.functional.gates import clipped
        >>> gate = by_advantage(clipped, low=0.8, high=1.2)
    """
    return lambda ratio, seen: gate(ratio, seen.advantages, **settings)


def by_probability(epsilon_low: float, epsilon_high: float, dual: float | None = None) -> Gate:
    """A clip whose bounds depend on the token's probability when it was sampled.

    Args:
        epsilon_low: ε of :func:`~grade_lightning.functional.probability_bounds.probability_bounds` below.
        epsilon_high: ε above.
        dual: also 0 where A < 0 and the ratio exceeds this.
    """

    def gate(ratio: Tensor, seen: Experience) -> Tensor:
        low, high = probability_bounds(seen.old.logps, epsilon_low, epsilon_high)
        return clipped(ratio, seen.advantages, low, high, dual)

    return gate


def by_hardness(threshold: float, temperature: float) -> Gate:
    """Of completions whose reward is below the threshold, their softmax weight among those of the prompt; of others 1.

    The weight is that of the policy as it is, by the mean log-probability of a completion's tokens, so all completions
    of a prompt must be in the same step (`whole_groups`). There is no importance weight.

    Args:
        threshold: a reward of this or more is right.
        temperature: of the softmax.
    """

    def gate(ratio: Tensor, seen: Experience) -> Tensor:
        mask, layout = seen.rollout.sampled, seen.rollout.layout
        now = seen.old.logps + ratio.clamp(min=torch.finfo(ratio.dtype).tiny).log()
        means = now.masked_fill(~mask, 0).sum(-1) / mask.sum(-1).clamp(min=1)
        wrong = layout.table(seen.scores.total) < threshold
        weights = layout.rows(hardness(layout.table(means), wrong, temperature))
        return weights.unsqueeze(1).expand_as(ratio)

    return gate


def complement(gate: Gate) -> Gate:
    """The ratio where a gate is 0, and 0 elsewhere: with a gate that clips, both lines together have no clip.

    Args:
        gate: the ratio, or 0.
    """
    return lambda ratio, seen: ratio.masked_fill(gate(ratio, seen) != 0, 0)


def reinforced(gate: Gate, mark: str) -> Gate:
    """A gate; 1, that is no importance weight, for completions that are marked.

    Args:
        gate: of the others.
        mark: name of the mark in `seen.extra`, (B,): 0 for the others.
    """
    return lambda ratio, seen: gate(ratio, seen).where(seen.extra[mark].unsqueeze(1) == 0, 1)


def standardised(gate: Gate, spread: float | None = None, total: Total = alone) -> Gate:
    """A gate that decides by the ratio less its mean over the batch; tokens that it leaves alone keep their own ratio.

    Experimental. In the first step of a window, where all ratios are 1, it is the gate itself.

    Args:
        gate: decides.
        spread: standard deviation that log-ratios are scaled down to; None: they are only centred.
        total: sum over all processes.
    """

    def decided(ratio: Tensor, seen: Experience) -> Tensor:
        judged = standardised_ratio(ratio, seen.sampled, spread, total)
        found = gate(judged, seen)
        return ratio.where(found == judged, found)

    return decided
