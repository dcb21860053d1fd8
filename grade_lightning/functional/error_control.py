"""Gradients that are sent in part, with what was not sent kept for later."""

import math
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor


class Sparse(NamedTuple):
    """Some components of a vector."""

    values: Tensor
    """(k,)."""
    places: Tensor
    """(k,), int64."""


def largest(vector: Float[Tensor, " n"], share: float) -> Sparse:
    """The components of the largest size, at least one.

    Example:
        >>> import torch
        >>> largest(torch.tensor([1.0, -3.0, 2.0, 0.0]), share=0.5).values
        tensor([-3.,  2.])
    """
    places = vector.abs().topk(max(1, math.ceil(share * len(vector)))).indices.sort().values
    return Sparse(vector[places], places)


def dense(sparse: Sparse, size: int) -> Float[Tensor, " n"]:
    """The vector that has these components and zeros; of places that occur more than once, the sum.

    Example:
        >>> import torch
        >>> dense(Sparse(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 2, 2])), 3)
        tensor([1., 0., 5.])
    """
    return sparse.values.new_zeros(size).index_add_(0, sparse.places, sparse.values)


def to_send(
    gradient: Float[Tensor, " n"], error: Float[Tensor, " n"], estimate: Float[Tensor, " n"], eta: float
) -> Float[Tensor, " n"]:
    """η e + g − h: what is compressed into the message Δ of a step; see :func:`received` for what becomes of it.

    η = 0 is EF21; with h held at 0, η = 1 is classic error feedback.

    Args:
        gradient: g, a worker's own.
        error: e, what its messages have left out so far.
        estimate: h, the sum of its messages.
        eta: η, how fast the error is made up for; about the share that is sent.

    References:
        | EControl: Fast Distributed Optimization with Compression and Error Control (Gao, Islamov, Stich, 2024),
          https://arxiv.org/abs/2311.05645. Written from memory and confirmed by its identities.
    """
    return eta * error + gradient - estimate


def received(
    gradient: Float[Tensor, " n"],
    error: Float[Tensor, " n"],
    estimate: Float[Tensor, " n"],
    message: Float[Tensor, " n"],
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Error and estimate after a message: h + Δ, and e + g − (h + Δ).

    The sum of all h that were applied, and e, is the sum of all gradients.

    Example:
        >>> import torch
        >>> received(torch.ones(1), torch.zeros(1), torch.zeros(1), torch.tensor([0.25]))
        (tensor([0.7500]), tensor([0.2500]))
    """
    after = estimate + message
    return error + gradient - after, after
