"""Virtual completions: rewards that nobody sampled, in the statistics of a group."""

import torch
from jaxtyping import Float
from torch import Tensor

from grade_lightning.functional.advantages import group_standardised


def virtual_best(
    rewards: Float[Tensor, "p g"], best: float, copies: int = 1, eps: float = 1e-4
) -> Float[Tensor, "p g"]:
    """(R − mean) / (std + eps) of each group and `copies` virtual completions of the best reward.

    A group in which every completion fails has a negative advantage; one of best rewards alone has none.

    Args:
        rewards: NaN where there is no reward.
        best: the largest reward that there can be.
        copies: virtual completions of each group; 0: :func:`.advantages.group_standardised`.
        eps: added to the standard deviation.

    References:
        | NGRPO: Negative-enhanced Group Relative Policy Optimization (Nan et al., 2025),
          https://arxiv.org/abs/2509.18851

    Example:
        >>> virtual_best(torch.tensor([[0.0] * 4, [1.0] * 4]), best=1.0)
        tensor([[-0.4471, -0.4471, -0.4471, -0.4471],
                [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    groups, size = rewards.shape
    extended = torch.cat([rewards, rewards.new_full((groups, copies), best)], dim=1)
    return group_standardised(extended, eps)[:, :size]
