"""When a conversation branches: a policy that has become less certain than it was."""

from jaxtyping import Float
from torch import Tensor


def first_surprise(logps: Float[Tensor, " t"], window: int) -> float:
    """Mean −log π of the first tokens of a turn: an estimate of their entropy from what was sampled; nats.

    Example:
        >>> import torch
        >>> first_surprise(torch.tensor([-1.0, -3.0, -9.0]), window=2)
        2.0
    """
    return float(-logps[:window].mean()) if len(logps) else 0.0


def branches(uniform: float, rise: float, probability: float, weight: float, penalty: float = 0.0) -> bool:
    """Whether u − w (H − H_first), held within 0 and 1, is at most p (1 − penalty).

    Args:
        uniform: u, a random number.
        rise: H − H_first, nats.
        probability: p.
        weight: w.
        penalty: of earlier branches in a row; 1 or more: there is none.

    References:
        | Agentic Reinforced Policy Optimization (Dong et al., 2025), https://arxiv.org/abs/2507.19849

    Example:
        >>> branches(0.6, rise=0.0, probability=0.5, weight=0.2), branches(0.6, rise=1.0, probability=0.5, weight=0.2)
        (False, True)
    """
    allowed = probability * (1 - penalty)
    return allowed > 0 and min(1.0, max(0.0, uniform - weight * rise)) <= allowed
