"""Penalties that are added to a completion's reward."""

from jaxtyping import Float, Int
from torch import Tensor


def overlong_penalty(lengths: Int[Tensor, " b"], longest: int, buffer: int) -> Float[Tensor, " b"]:
    """0 up to `longest − buffer` tokens, then falling on a straight line to −1 at `longest`.

    References:
        | DAPO (Yu et al., 2025), https://arxiv.org/abs/2503.14476

    Example:
        >>> import torch
        >>> overlong_penalty(torch.tensor([80, 90, 100]), longest=100, buffer=20)
        tensor([ 0.0000, -0.5000, -1.0000])
    """
    return ((longest - buffer - lengths) / buffer).clamp(-1, 0)
