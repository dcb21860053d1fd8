"""Bounds of a ratio that depend on how probable the token was."""

from jaxtyping import Float
from torch import Tensor


def probability_bounds(
    old_logps: Float[Tensor, "b t"], epsilon_low: float, epsilon_high: float, cap: float = 10.0
) -> tuple[Float[Tensor, "b t"], Float[Tensor, "b t"]]:
    """Lower and upper bound of r = π / π_old, from |(r − 1) π| ≤ ε: the rarer the token, the more room it has.

    Args:
        old_logps: log π_old.
        epsilon_low: ε below.
        epsilon_high: ε above.
        cap: the upper bound is at most this; the lower one is 0.5 or more by itself.

    References:
        | DCPO: Dynamic Clipping Policy Optimization (Yang et al., 2025), https://arxiv.org/abs/2509.02333

    Example:
        >>> import torch
        >>> probability_bounds(torch.tensor([[0.9, 0.01]]).log(), 0.16, 0.2)
        (tensor([[0.7687, 0.5000]]), tensor([[1.1872, 5.0000]]))
    """
    inverse = (-old_logps).exp()
    low = 0.5 + 0.5 * (1 - 4 * epsilon_low * inverse).clamp(min=0).sqrt()
    high = 0.5 + 0.5 * (1 + 4 * epsilon_high * inverse).sqrt()
    return low, high.clamp(max=cap)
