"""Aggregations: the weight of each token in the loss."""

from typing import NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor


class Normalizers(NamedTuple):
    """What a mean is taken over: all of an optimizer step, over its micro-batches and processes.

    Where losses of W processes and A micro-batches are averaged afterwards, these are 1 / (W A) of the counts.
    """

    tokens: float | Tensor
    sequences: float


def token_mean(mask: Bool[Tensor, "b t"], normalizers: Normalizers) -> Float[Tensor, "b t"]:
    """Every token the same: 1 / tokens; 0 where there is no token at all.

    Example:
        >>> import torch
        >>> token_mean(torch.tensor([[True, True], [True, False]]), Normalizers(tokens=3, sequences=2))
        tensor([[0.3333, 0.3333],
                [0.3333, 0.0000]])
    """
    return (mask.float() / normalizers.tokens).masked_fill(~mask, 0)


def sequence_mean(mask: Bool[Tensor, "b t"], normalizers: Normalizers) -> Float[Tensor, "b t"]:
    """Every sequence the same, whatever its length: 1 / (sequences × its length).

    Example:
        >>> import torch
        >>> sequence_mean(torch.tensor([[True, True], [True, False]]), Normalizers(tokens=3, sequences=2))
        tensor([[0.2500, 0.2500],
                [0.5000, 0.0000]])
    """
    return mask.float() / mask.sum(-1, keepdim=True).clamp(min=1) / normalizers.sequences


def constant(mask: Bool[Tensor, "b t"], normalizers: Normalizers, length: int) -> Float[Tensor, "b t"]:
    """Token sum over a constant length, mean over sequences: 1 / (sequences × length).

    References:
        | Understanding R1-Zero-Like Training: A Critical Perspective (Liu et al., 2025),
          https://arxiv.org/abs/2503.20783
    """
    return mask.float() / (normalizers.sequences * length)


def sequence_sum(mask: Bool[Tensor, "b t"], normalizers: Normalizers) -> Float[Tensor, "b t"]:
    """Token sum, mean over sequences, 1 / sequences: the gradient of the expected reward itself."""
    return mask.float() / normalizers.sequences


def group_sum(mask: Bool[Tensor, "b t"], normalizers: Normalizers, size: int) -> Float[Tensor, "b t"]:
    """Mean over the tokens of each sequence, sum over the `size` sequences of a prompt, mean over prompts.

    References:
        | DRPO: Efficient Reasoning via Decoupled Reward Policy Optimization (Li et al., 2025),
          https://arxiv.org/abs/2510.04474

    Example:
        >>> import torch
        >>> group_sum(torch.tensor([[True, True], [True, False]]), Normalizers(tokens=3, sequences=2), size=2)
        tensor([[0.5000, 0.5000],
                [1.0000, 0.0000]])
    """
    return size * sequence_mean(mask, normalizers)
