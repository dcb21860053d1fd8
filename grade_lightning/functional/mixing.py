"""A biased and an unbiased estimate of a gradient from the same samples: how much of each has the smallest error.

Letters in shapes: n parts of a batch.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Errors(NamedTuple):
    """Of the means of a batch of two estimates; squared lengths of gradients, each may come out negative."""

    biased: Tensor
    """Variance of the biased one."""
    unbiased: Tensor
    """Variance of the unbiased one."""
    shared: Tensor
    """Their covariance."""
    bias: Tensor
    """Squared length of the difference of their expectations."""


def errors(biased: Float[Tensor, "n n"], between: Float[Tensor, "n n"], unbiased: Float[Tensor, "n n"]) -> Errors:
    """Unbiased estimates of them, from inner products of the gradients of n independent parts of a batch.

    What differs in expectation is taken from products of different parts alone, so their noise is not in it.

    Args:
        biased: products of the biased gradients of the parts.
        between: of the biased ones (rows) and the unbiased ones (columns).
        unbiased: of the unbiased ones.

    Example:
        >>> one, two = torch.tensor([[1.0], [1.0]]), torch.tensor([[0.0], [4.0]])  # without noise, and with a mean of 2
        >>> [float(x) for x in errors(one @ one.T, one @ two.T, two @ two.T)]
        [0.0, 4.0, 0.0, -3.0]
    """
    count = len(biased)
    own = torch.stack([x.diagonal().mean() for x in (biased, between, unbiased)])
    crossed = (torch.stack([x.sum() for x in (biased, between, unbiased)]) - count * own) / (count * (count - 1))
    b, s, u = (own - crossed) / count
    return Errors(b, u, s, crossed[0] - 2 * crossed[1] + crossed[2])


def mix_weight(found: Errors) -> Float[Tensor, ""]:
    """λ of λ · biased + (1 − λ) · unbiased with the smallest expected squared error, between 0 and 1.

    (V_U − C) / (V_U + V_B − 2 C + bias²).

    Example:
        >>> of = lambda *values: Errors(*map(torch.tensor, values))
        >>> float(mix_weight(of(0.0, 3.0, 0.0, 1.0))), float(mix_weight(of(0.0, 3.0, 0.0, -5.0)))
        (0.75, 1.0)
    """
    gain = found.unbiased - found.shared
    whole = gain + found.biased - found.shared + found.bias.clamp(min=0)
    return torch.where(whole > 0, gain / whole, (gain > 0).to(gain)).clamp(0, 1)
