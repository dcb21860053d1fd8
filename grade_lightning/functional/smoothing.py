"""Statistics of a prompt over all its visits, and advantages that lean on them."""

import torch
from jaxtyping import Float
from torch import Tensor

from grade_lightning.functional.advantages import group_standardised, has_spread

Moments = tuple[Tensor, Tensor]
"""Mean and variance."""


def group_moments(rewards: Float[Tensor, "p g"]) -> tuple[Float[Tensor, " p"], Float[Tensor, " p"]]:
    """Mean and unbiased variance of each group; NaN rewards count in neither, and a group of them alone has mean NaN.

    Example:
        >>> group_moments(torch.tensor([[0.0, 1.0, torch.nan], [0.1, 0.1, 0.1]]))
        (tensor([0.5000, 0.1000]), tensor([0.5000, 0.0000]))
    """
    mean = rewards.nanmean(-1)
    answered = (~rewards.isnan()).sum(-1).to(rewards.dtype)
    variance = (rewards - mean.unsqueeze(-1)).square().nansum(-1) / (answered - 1).clamp(min=1)
    return mean, variance.masked_fill(~has_spread(rewards), 0)


def merged_moments(visits: Tensor, known: Moments, new: Moments) -> Moments:
    """Mean and variance over `visits` earlier visits, whose moments are known, and a new one, which count the same.

    Example:
        >>> one, zero = torch.ones(()), torch.zeros(())
        >>> merged_moments(one, (one / 2, zero), (one, zero))
        (tensor(0.7500), tensor(0.0625))
    """
    (mean, variance), (new_mean, new_variance) = known, new
    between = visits / (visits + 1) * (new_mean - mean).square()
    together = (visits * mean + new_mean) / (visits + 1)
    return together, (visits * variance + new_variance + between) / (visits + 1)


def smoothed(
    rewards: Float[Tensor, "p g"],
    visits: Float[Tensor, " p"],
    mean: Float[Tensor, " p"],
    variance: Float[Tensor, " p"],
    eps: float = 1e-4,
) -> Float[Tensor, "p g"]:
    """The standardised reward by the group, blended with that by all visits of the prompt.

    Of the two blends, (i − 1 : 1) and (1 : i − 1) at the i-th visit, the one with the smaller magnitude. At the first
    visit: :func:`.advantages.group_standardised`.

    Args:
        rewards: of this visit; NaN where there is no reward.
        visits: how many there were before.
        mean: of the rewards of those; ignored where there were none.
        variance: of the rewards of those; ignored where there were none.
        eps: added to the standard deviations.

    References:
        | DCPO: Dynamic Clipping Policy Optimization (Yang et al., 2025), https://arxiv.org/abs/2509.02333

    Example:
        >>> one = torch.ones(1)
        >>> smoothed(torch.ones(1, 2), visits=one, mean=0.5 * one, variance=0 * one)
        tensor([[0.4998, 0.4998]])
    """
    own = group_standardised(rewards, eps).nan_to_num(nan=0.0)
    before = visits.unsqueeze(-1)
    together, spread = merged_moments(visits, (mean, variance), group_moments(rewards))
    deviation = spread.sqrt().unsqueeze(-1)
    whole = (rewards - together.unsqueeze(-1)) / (deviation + eps)
    whole = whole.masked_fill(deviation == 0, 0).nan_to_num(nan=0.0)
    near, far = (before * own + whole) / (before + 1), (own + before * whole) / (before + 1)
    blended = torch.where(near.abs() < far.abs(), near, far)
    return torch.where(before == 0, own, blended)
