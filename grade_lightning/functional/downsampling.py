"""Which completions and tokens to train on, where not all of them are."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def max_variance_subset(
    values: Float[Tensor, " n"], count: int, candidates: Bool[Tensor, " n"] | None = None
) -> Bool[Tensor, " n"]:
    """Which `count` of the values have the largest variance: some of the smallest, and the rest of the largest.

    Args:
        values: of each completion.
        count: how many to choose; all candidates where there are no more.
        candidates: which may be chosen; all by default.

    References:
        | D3S: Learning More with Less: A Dynamic Dual-Level Down-Sampling Framework for Efficient Policy Optimization
          (Wang et al., 2025), https://arxiv.org/abs/2509.22115
        | that the j smallest and the others among the largest are best: PODS (Xu et al., 2025),
          https://arxiv.org/abs/2504.13818

    Example:
        >>> max_variance_subset(torch.tensor([0.0, 0.4, 0.5, 1.0]), count=2)
        tensor([ True, False, False,  True])
    """
    candidates = torch.ones_like(values, dtype=torch.bool) if candidates is None else candidates
    count = min(count, len(values))
    order = values.masked_fill(~candidates, torch.inf).argsort(stable=True)  # those that may not be chosen come last
    rank = order.argsort()
    exact = values[order].double().masked_fill(~candidates[order], 0)
    sums, squares = (torch.cat([x.new_zeros(1), x.cumsum(0)]) for x in (exact, exact.square()))
    available = candidates.sum()
    chosen = available.clamp(max=count)
    low = torch.arange(count + 1, device=values.device)
    upper = (available - (chosen - low)).clamp(min=0)  # from this rank on they are among the largest
    first, second = (x.gather(0, low) + x[-1] - x.gather(0, upper) for x in (sums, squares))
    variance = second / chosen.clamp(min=1) - (first / chosen.clamp(min=1)).square()
    best = variance.masked_fill(low > chosen, -torch.inf).argmax()
    return ((rank < best) | (rank >= available - (chosen - best))) & candidates


def top_share(scores: Float[Tensor, "b t"], share: float, candidates: Bool[Tensor, "b t"]) -> Bool[Tensor, "b t"]:
    """The share of the candidates with the highest scores, rounded up; among equals the first.

    Example:
        >>> top_share(torch.tensor([[3.0, 1.0, 2.0]]), 0.5, torch.tensor([[True, True, False]]))
        tensor([[ True, False, False]])
    """
    order = scores.masked_fill(~candidates, -torch.inf).flatten().argsort(descending=True, stable=True)
    rank = order.argsort().view_as(scores)
    wanted = (candidates.sum() * share - 1e-4).ceil()  # 0.3 of 10 are 3, whatever 0.3 is in binary
    return candidates & (rank < wanted)


def kept_count(total: int, share: float) -> int:
    """A share of so many, rounded up.

    Example:
        >>> kept_count(12, 0.25), kept_count(10, 0.3), kept_count(3, 0.5)
        (3, 3, 2)
    """
    return math.ceil(total * share - 1e-9)
