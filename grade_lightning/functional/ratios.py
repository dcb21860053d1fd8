"""Ratios of the policy to the one that sampled, of a token, a turn or a sequence."""

from collections.abc import Callable
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from grade_lightning.functional.advantages import Total, alone, mean_and_variance

Level: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(values, mask) → means over each segment, spread over its tokens; all (B, T)."""


def importance_ratio(
    logps: Float[Tensor, "b t"],
    old_logps: Float[Tensor, "b t"],
    mask: Bool[Tensor, "b t"],
    level: Level,
) -> Float[Tensor, "b t"]:
    """The exponential of the level's mean of log π − log π_old: at the levels of turns and sequences a geometric mean.

    Example:
        >>> import torch
        >>> logps, old = torch.tensor([[0.3, 0.1]]), torch.tensor([[0.0, 0.0]])
        >>> importance_ratio(logps, old, torch.ones(1, 2, dtype=torch.bool), sequence_level).log()
        tensor([[0.2000, 0.2000]])
    """
    delta = (logps - old_logps).detach().masked_fill(~mask, 0)
    return level(delta, mask).exp()


def standardised_ratio(
    ratio: Float[Tensor, "b t"],
    mask: Bool[Tensor, "b t"],
    spread: float | None = None,
    total: Total = alone,
) -> Float[Tensor, "b t"]:
    """The ratio over the geometric mean of all ratios and, with a spread, the logarithm scaled down to that deviation.

    So a drift that all tokens share does not count as having left the bounds. A smaller deviation is not scaled up: it
    may be rounding alone. Where all ratios are 1, they stay 1.

    Args:
        ratio: π / π_old.
        mask: tokens that count; other positions are 1.
        spread: standard deviation that log-ratios have at most, such as 0.1; None: as they are.
        total: sum over all processes.

    References:
        | our reading, for tokens, of GRPO-Guard: Mitigating Implicit Over-Optimization in Flow Matching via Regulated
          Clipping (2025), https://arxiv.org/abs/2510.22319

    Example:
        >>> import torch
        >>> ratio, mask = torch.tensor([[2.0, 8.0]]), torch.ones(1, 2, dtype=torch.bool)
        >>> standardised_ratio(ratio, mask)
        tensor([[0.5000, 2.0000]])
    """
    logs = ratio.clamp(min=torch.finfo(ratio.dtype).tiny).log()
    mean, variance = mean_and_variance(logs, mask, total)
    centred = logs - mean.to(logs.dtype)
    if spread is not None:
        centred = centred * (spread / variance.sqrt().clamp(min=spread)).to(logs.dtype)
    return centred.masked_fill(~mask, 0).exp()


def token_level(values: Float[Tensor, "b t"], mask: Bool[Tensor, "b t"]) -> Float[Tensor, "b t"]:
    """Each token by itself."""
    return values


def sequence_level(values: Float[Tensor, "b t"], mask: Bool[Tensor, "b t"]) -> Float[Tensor, "b t"]:
    """The mean over each sequence, at each of its tokens.

    References:
        | Group Sequence Policy Optimization (Zheng et al., 2025), https://arxiv.org/abs/2507.18071

    Example:
        >>> import torch
        >>> sequence_level(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[True, True, False]]))
        tensor([[2., 2., 2.]])
    """
    mean = values.masked_fill(~mask, 0).sum(-1) / mask.sum(-1).clamp(min=1)
    return mean.unsqueeze(-1).expand_as(values)


def turn_level(
    values: Float[Tensor, "b t"], mask: Bool[Tensor, "b t"], turns: Int[Tensor, "b t"]
) -> Float[Tensor, "b t"]:
    """The mean over each turn; `turns` numbers the turn that each token belongs to, from 0 to at most t.

    Example:
        >>> import torch
        >>> mask = torch.ones(1, 3, dtype=torch.bool)
        >>> turn_level(torch.tensor([[1.0, 3.0, 9.0]]), mask, torch.tensor([[0, 0, 1]]))
        tensor([[2., 2., 9.]])
    """
    sums = values.new_zeros(len(values), values.shape[1] + 1)  # how many there are only the device knows
    counts = sums.scatter_add(1, turns, mask.to(values.dtype)).clamp(min=1)
    means = sums.scatter_add(1, turns, values.masked_fill(~mask, 0)) / counts
    return means.gather(1, turns)
