"""Gates: the coefficient of A ∇log π, as a function of the ratio and the advantage."""

from collections.abc import Callable
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

Gate: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(ratio, advantages) → coefficient ≥ 0; all (B, T)."""


def reinforce(ratio: Float[Tensor, "b t"], advantages: Float[Tensor, "b t"]) -> Float[Tensor, "b t"]:
    """1: no importance weight.

    References:
        | Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning (Williams, 1992)
    """
    return torch.ones_like(ratio)


def importance(ratio: Float[Tensor, "b t"], advantages: Float[Tensor, "b t"]) -> Float[Tensor, "b t"]:
    """The ratio itself, unbounded."""
    return ratio


def clipped(
    ratio: Float[Tensor, "b t"],
    advantages: Float[Tensor, "b t"],
    low: float | Tensor,
    high: float | Tensor,
    dual: float | None = None,
) -> Float[Tensor, "b t"]:
    """The ratio; 0 once it has gone beyond the bound to which the advantage pushes it.

    Args:
        ratio: π / π_old.
        advantages: A.
        low: bound of the ratio where A < 0, such as 0.8; or one of each token, (B, T).
        high: bound of the ratio where A > 0, such as 1.2; or one of each token, (B, T).
        dual: also 0 where A < 0 and the ratio exceeds this (dual clip).

    References:
        | Proximal Policy Optimization Algorithms (Schulman et al., 2017), https://arxiv.org/abs/1707.06347
        | dual clip: Mastering Complex Control in MOBA Games with Deep Reinforcement Learning (Ye et al., 2020),
          https://arxiv.org/abs/1912.09729

    Example:
        >>> ratio, up = torch.tensor([[0.5, 1.5, 1.1]]), torch.ones(1, 3)
        >>> clipped(ratio, up, 0.8, 1.2)
        tensor([[0.5000, 0.0000, 1.1000]])
        >>> clipped(ratio, -up, 0.8, 1.2)
        tensor([[0.0000, 1.5000, 1.1000]])
    """
    beyond = ((advantages > 0) & (ratio > high)) | ((advantages < 0) & (ratio < low))
    if dual is not None:
        beyond |= (advantages < 0) & (ratio > dual)
    return ratio.masked_fill(beyond, 0)


def gppo(
    ratio: Float[Tensor, "b t"],
    advantages: Float[Tensor, "b t"],
    low: float,
    high: float,
    low_scale: float = 1.0,
    high_scale: float = 1.0,
    dual: float | None = None,
) -> Float[Tensor, "b t"]:
    """As :func:`clipped`, but what it would cut off keeps the bound (times a scale) as its coefficient.

    References:
        | Klear-Reasoner: Advancing Reasoning Capability via Gradient-Preserving Clipping Policy Optimization
          (Su et al., 2025), https://arxiv.org/abs/2508.07629
        | the scales: CE-GPPO (2025), https://arxiv.org/abs/2509.20712

    Example:
        >>> gppo(torch.tensor([[0.5, 1.5]]), torch.tensor([[1.0, 1.0]]), 0.8, 1.2)
        tensor([[0.5000, 1.2000]])
    """
    above, below = (advantages > 0) & (ratio > high), (advantages < 0) & (ratio < low)
    kept = ratio.masked_fill(above, high_scale * high).masked_fill(below, low_scale * low)
    return kept if dual is None else kept.masked_fill((advantages < 0) & (ratio > dual), 0)


def cispo(
    ratio: Float[Tensor, "b t"], advantages: Float[Tensor, "b t"], low: float, high: float
) -> Float[Tensor, "b t"]:
    """The ratio, bounded on both sides whatever the advantage's sign: every token keeps a gradient.

    References:
        | MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention (2025),
          https://arxiv.org/abs/2506.13585

    Example:
        >>> cispo(torch.tensor([[0.5, 7.0]]), torch.ones(1, 2), 0.0, 5.0)
        tensor([[0.5000, 5.0000]])
    """
    return ratio.clamp(low, high)


def sapo(
    ratio: Float[Tensor, "b t"], advantages: Float[Tensor, "b t"], tau_pos: float, tau_neg: float
) -> Float[Tensor, "b t"]:
    """The ratio r times sech²(τ (r − 1) / 2): a soft gate; τ depends on the advantage's sign.

    References:
        | Soft Adaptive Policy Optimization (Gao et al., 2025), https://arxiv.org/abs/2511.20347

    Example:
        >>> sapo(torch.tensor([[1.0, 3.0]]), torch.ones(1, 2), 1.0, 1.05)
        tensor([[1.0000, 1.2599]])
    """
    tau = torch.where(advantages > 0, ratio.new_tensor(tau_pos), tau_neg)
    return ratio / (tau / 2 * (ratio - 1)).cosh().square()
