"""The weight gradient of a linear layer from some of its rows."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Rows(NamedTuple):
    """Rows that stand for all, and what each counts."""

    places: Tensor
    """(k,), int64; a place may occur several times."""
    scales: Tensor
    """(k,)."""


def shares(sizes: Float[Tensor, " n"], floor: float = 1e-3) -> Float[Tensor, " n"]:
    """Probabilities in proportion to sizes; none is below `floor` / n before they are made to sum to 1.

    Example:
        >>> shares(torch.tensor([1.0, 3.0]))
        tensor([0.2500, 0.7500])
    """
    whole = sizes.sum()
    given = torch.where(whole > 0, sizes / whole.clamp(min=torch.finfo(sizes.dtype).tiny), 1 / len(sizes))
    raised = given.clamp(min=floor / len(sizes))
    return raised / raised.sum()


def winners(probabilities: Float[Tensor, " n"], k: int) -> Tensor:
    """c*: how many of the likeliest rows are to be kept, of k: the c with the least (1 − Q_c) / (k − c), Q_c their sum.

    A scalar without a synchronisation of the device.

    Example:
        >>> int(winners(torch.tensor([0.7, 0.1, 0.1, 0.1]), k=2)), int(winners(torch.full((4,), 0.25), k=2))
        (1, 0)
    """
    likeliest = probabilities.topk(k).values
    left = 1 - torch.cat([likeliest.new_zeros(1), likeliest.cumsum(0)[:-1]])
    return (left / torch.arange(k, 0, -1, device=left.device)).argmin()


def rest(probabilities: Float[Tensor, " n"], k: int) -> tuple[Tensor, Float[Tensor, " n"], Tensor]:
    """The likeliest k rows in order, the probabilities of what is drawn beside the winners, and how many these are."""
    count, order = winners(probabilities, k), probabilities.argsort(descending=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    others = probabilities.masked_fill(rank < count, 0)
    return order[:k], others / others.sum(), count


def winner_take_all(probabilities: Float[Tensor, " n"], k: int) -> Rows:
    """K rows: the c* likeliest as they are, the others drawn from the rest, with replacement, and scaled.

    The sum of the chosen rows' terms, times their scales, is the sum over all rows on average, whatever the
    probabilities. With k = n it is that sum itself.

    Args:
        probabilities: one for each row, none of them 0.
        k: at most n.

    References:
        | Winner-Take-All Column Row Sampling for Memory Efficient Adaptation of Language Model (Liu et al., 2023),
          https://arxiv.org/abs/2305.15265

    Example:
        >>> winner_take_all(torch.tensor([0.2, 0.8]), k=2).scales
        tensor([1., 1.])
    """
    if k >= len(probabilities):
        places = torch.arange(len(probabilities), device=probabilities.device)
        return Rows(places, torch.ones_like(probabilities))
    likeliest, others, count = rest(probabilities, k)
    drawn = others.multinomial(k, replacement=True)
    kept = torch.arange(k, device=count.device) < count
    places = torch.where(kept, likeliest, drawn)
    return Rows(places, torch.where(kept, 1, 1 / ((k - count) * others[drawn])))
