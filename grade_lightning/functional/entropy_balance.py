"""Entropy in the weight of advantages, and in the decision where a rollout branches."""

from jaxtyping import Float
from torch import Tensor


def entropy_weight(surprise: Float[Tensor, "b t"], scale: float) -> Float[Tensor, "b t"]:
    """1 + a z, not below 0.

    Args:
        surprise: z, the entropy of each token, standardised over the batch.
        scale: a.

    References:
        | Agentic Entropy-Balanced Policy Optimization (Dong et al., 2025), https://arxiv.org/abs/2510.14545

    Example:
        >>> import torch
        >>> entropy_weight(torch.tensor([[-9.0, 0.0, 1.0]]), scale=0.2)
        tensor([[0.0000, 1.0000, 1.2000]])
    """
    return (1 + scale * surprise).clamp(min=0)
