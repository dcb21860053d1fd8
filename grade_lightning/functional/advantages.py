"""Baselines and advantages: how good a completion, or a token, was compared with what was to be expected.

Rewards of groups are (p, g): p prompts with g completions each; NaN where the reward abstains. Such a completion counts
in no statistic, and its advantage is 0. `total` adds a tensor up over the processes; alone, it is the identity.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Total: TypeAlias = Callable[[Tensor], Tensor]


def alone(values: Tensor) -> Tensor:
    """The total where there is one process."""
    return values


def ema(baseline: Float[Tensor, ""], mean: Float[Tensor, ""], decay: float) -> Float[Tensor, ""]:
    """Exponential moving average; a NaN baseline has seen nothing yet, a NaN mean leaves it.

    Example:
        >>> ema(torch.tensor(0.5), torch.tensor(1.0), decay=0.9)
        tensor(0.5500)
        >>> ema(torch.tensor(torch.nan), torch.tensor(1.0), decay=0.9)
        tensor(1.)
    """
    moved = torch.where(baseline.isnan(), mean, decay * baseline + (1 - decay) * mean)
    return torch.where(mean.isnan(), baseline, moved)


def has_spread(rewards: Float[Tensor, "p g"]) -> Bool[Tensor, " p"]:
    """Whether a group has different rewards; not by way of its mean, which is rounded.

    Example:
        >>> has_spread(torch.tensor([[0.1] * 8, [0.1] * 7 + [0.2], [0.1] * 7 + [torch.nan], [torch.nan] * 8]))
        tensor([False,  True, False, False])
    """
    return rewards.nan_to_num(nan=-torch.inf).amax(-1) > rewards.nan_to_num(nan=torch.inf).amin(-1)


def group_centred(rewards: Float[Tensor, "p g"]) -> Float[Tensor, "p g"]:
    """R − the group's mean; exactly 0 in a group of equal rewards.

    Example:
        >>> group_centred(torch.tensor([[0.0, 1.0, torch.nan], [0.1, 0.1, 0.1]]))
        tensor([[-0.5000,  0.5000,  0.0000],
                [ 0.0000,  0.0000,  0.0000]])
    """
    centred = (rewards - rewards.nanmean(-1, keepdim=True)).nan_to_num(nan=0.0)
    return centred.masked_fill(~has_spread(rewards).unsqueeze(-1), 0)


def leave_one_out(rewards: Float[Tensor, "p g"]) -> Float[Tensor, "p g"]:
    """R − the mean of the group's other rewards, which is g / (g − 1) times the centred one; unbiased.

    References:
        | Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in LLMs
          (Ahmadian et al., 2024), https://arxiv.org/abs/2402.14740

    Example:
        >>> leave_one_out(torch.tensor([[0.0, 1.0, 5.0]]))
        tensor([[-3.0000, -1.5000,  4.5000]])
    """
    n = _answered(rewards)
    return group_centred(rewards) * n / (n - 1).clamp(min=1)


def off_others(
    values: Float[Tensor, "b t"], mask: Bool[Tensor, "b t"], groups: Int[Tensor, " b"]
) -> Float[Tensor, "b t"]:
    """Values less their mean over the group's other rows that have the position; 0 outside of the mask.

    Where no other row has it, the value stays.

    Args:
        values: of each position.
        mask: which positions a row has.
        groups: the group of each row, from 0.

    Example:
        >>> mask = torch.tensor([[True, True], [True, False]])
        >>> off_others(torch.tensor([[1.0, 2.0], [4.0, 9.0]]), mask, torch.tensor([0, 0]))
        tensor([[-3.,  2.],
                [ 3.,  0.]])
    """
    own, there = values.masked_fill(~mask, 0), mask.to(values.dtype)
    empty = values.new_zeros(int(groups.max()) + 1, values.shape[1])
    sums, counts = (empty.index_add(0, groups, x)[groups] - x for x in (own, there))
    return (own - sums / counts.clamp(min=1)).masked_fill(~mask, 0)


def group_standardised(rewards: Float[Tensor, "p g"], eps: float = 1e-4) -> Float[Tensor, "p g"]:
    """(R − mean) / (std + eps) of each group; std is the unbiased one.

    References:
        | DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models (Shao et al., 2024),
          https://arxiv.org/abs/2402.03300; eps as in TRL.

    Example:
        >>> group_standardised(torch.tensor([[0.0, 1.0]]), eps=0.0)
        tensor([[-0.7071,  0.7071]])
    """
    centred = group_centred(rewards)
    variance = centred.square().sum(-1, keepdim=True) / (_answered(rewards) - 1).clamp(min=1)
    return centred / (variance.sqrt() + eps)


def batch_standardised(rewards: Float[Tensor, "p g"], eps: float = 1e-4, total: Total = alone) -> Float[Tensor, "p g"]:
    """(R − the group's mean) / (std of all the batch's rewards + eps).

    References:
        | Part I: Tricks or Traps? A Deep Dive into RL for LLM Reasoning (Liu et al., 2025),
          https://arxiv.org/abs/2508.08221

    Example:
        >>> batch_standardised(torch.tensor([[0.0, 1.0], [3.0, 4.0]]), eps=0.0)
        tensor([[-0.2739,  0.2739],
                [-0.2739,  0.2739]])
    """
    _, variance = mean_and_variance(rewards, ~rewards.isnan(), total)
    return group_centred(rewards) / (variance.sqrt() + eps).to(rewards.dtype)


def whiten(values: Float[Tensor, "b t"], mask: Bool[Tensor, "b t"], total: Total = alone) -> Float[Tensor, "b t"]:
    """(x − mean) / std over all tokens of the batch; 0 outside of the mask.

    Example:
        >>> whiten(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[True, True, False]]))
        tensor([[-0.7071,  0.7071,  0.0000]])
    """
    mean, variance = mean_and_variance(values, mask, total)
    white = (values - mean.to(values.dtype)) * (variance + 1e-8).rsqrt().to(values.dtype)
    return white.masked_fill(~mask, 0)


def discounted_returns(
    rewards: Float[Tensor, "b t"], mask: Bool[Tensor, "b t"], gamma: float = 1.0
) -> Float[Tensor, "b t"]:
    """Reward from each token on, Σ_{u ≥ t} γ^(u − t) r_u; 0 outside of the mask.

    Tokens outside of the mask, such as a tool's answer between two turns, are no time steps.

    Example:
        >>> discounted_returns(torch.tensor([[1.0, 9.0, 2.0, 9.0]]), torch.tensor([[True, False, True, False]]), 0.5)
        tensor([[2., 0., 2., 0.]])
    """
    return _backwards(rewards, mask, gamma)


def gae(
    rewards: Float[Tensor, "b t"],
    values: Float[Tensor, "b t"],
    mask: Bool[Tensor, "b t"],
    gamma: float = 1.0,
    lam: float = 0.95,
) -> Float[Tensor, "b t"]:
    """Generalised advantage estimates, Σ_{u ≥ t} (γλ)^(u − t) (r_u + γ V_{u+1} − V_u); 0 outside of the mask.

    The value after the last token is 0, whether the completion ended there or was cut. Tokens outside of the mask, such
    as a tool's answer between two turns, are no time steps.

    Args:
        rewards: of each token.
        values: V_t, expected return before token t is chosen.
        mask: tokens that are trained on.
        gamma: discount.
        lam: 1 trusts the rewards alone, 0 trusts the values.

    References:
        | High-Dimensional Continuous Control Using Generalized Advantage Estimation (Schulman et al., 2015),
          https://arxiv.org/abs/1506.02438

    Example:
        >>> mask = torch.ones(1, 2, dtype=torch.bool)
        >>> gae(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.2, 0.5]]), mask, lam=1.0)
        tensor([[0.8000, 0.5000]])
    """
    later, following = torch.zeros_like(values), torch.zeros_like(values[:, 0])
    for t in range(values.shape[1] - 1, -1, -1):
        later[:, t] = following
        following = torch.where(mask[:, t], values[:, t], following)
    return _backwards(rewards + gamma * later - values, mask, gamma * lam)


def _backwards(values: Tensor, mask: Tensor, decay: float) -> Tensor:
    sums = torch.zeros_like(values)
    running = torch.zeros_like(values[:, 0])
    for t in range(values.shape[1] - 1, -1, -1):
        running = torch.where(mask[:, t], values[:, t] + decay * running, running)
        sums[:, t] = running
    return sums.masked_fill(~mask, 0)


def _answered(rewards: Tensor) -> Tensor:
    return (~rewards.isnan()).sum(-1, keepdim=True).to(rewards.dtype)


def mean_and_variance(values: Tensor, mask: Tensor, total: Total) -> tuple[Tensor, Tensor]:
    """Of what the mask shows on all processes; the variance is the unbiased one. In float64: it is a difference."""
    exact = torch.float32 if values.device.type == "mps" else torch.float64  # which knows no float64
    shown = values.detach().masked_fill(~mask, 0).to(exact)
    count, first, second = total(torch.stack([mask.sum().to(exact), shown.sum(), shown.square().sum()])).unbind()
    mean = first / count.clamp(min=1)
    return mean, ((second - count * mean.square()) / (count - 1).clamp(min=1)).clamp(min=0)
