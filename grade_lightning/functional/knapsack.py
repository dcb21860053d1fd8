"""How many completions each prompt gets: where they are most likely to have a gradient that is worth having."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor


def rollout_value(rates: Float[Tensor, " p"], counts: Int[Tensor, " p"]) -> Float[Tensor, " p"]:
    """[1 − p^N − (1 − p)^N] p (1 − p)²: the chance that N completions differ, times what is to be learnt from them.

    Example:
        >>> rollout_value(torch.tensor([0.5, 0.0]), torch.tensor([2, 2]))
        tensor([0.0625, 0.0000])
    """
    differ = 1 - rates**counts - (1 - rates) ** counts
    return differ * rates * (1 - rates).square()


def expected_need(rates: Float[Tensor, " p"], most: int = 128, confidence: float = 0.9) -> Float[Tensor, " p"]:
    """With how many completions they differ, with this confidence; at most `most`.

    Example:
        >>> expected_need(torch.tensor([0.5, 0.1, 0.01]))
        tensor([  3.3219,  21.8543, 128.0000])
    """
    usual = torch.maximum(rates, 1 - rates)
    return (math.log(1 - confidence) / usual.log()).clamp(max=most)


def best_counts(rates: Float[Tensor, " p"], budget: int, least: int, most: int) -> Int[Tensor, " p"]:
    """Completions of each prompt that maximise the sum of :func:`rollout_value`; they sum to the budget if they can.

    The value is concave in N, so the largest gains of a further completion are taken first.

    Args:
        rates: success rate of each prompt.
        budget: completions in all, `least` or more for each.
        least: of each prompt.
        most: of each prompt.

    Example:
        >>> best_counts(torch.tensor([0.05, 0.2, 0.5, 0.9]), budget=32, least=2, most=128)
        tensor([10, 13,  7,  2])
    """
    p = rates.double().unsqueeze(1)
    n = torch.arange(least, most, dtype=p.dtype)
    gains = (p**n * (1 - p) + (1 - p) ** n * p) * p * (1 - p).square()  # of the (n + 1)-th completion
    chosen = gains.flatten().argsort(descending=True, stable=True)[: budget - least * len(rates)]
    owners = chosen.div(max(1, most - least), rounding_mode="floor")
    return least + torch.bincount(owners, minlength=len(rates))


def allocate(rates: Float[Tensor, " p"], budget: int, least: int = 2, most: int = 128) -> Int[Tensor, " p"]:
    """Completions of each prompt; they always sum to the budget.

    Prompts of which nothing is known get an equal share, others `least`; the rest goes to those that succeed sometimes
    (:func:`best_counts`). What these are not expected to need goes to those that never do; without any of these, to the
    others.

    Args:
        rates: success rate of each prompt; NaN: unknown.
        budget: completions in all.
        least: of a known prompt.
        most: of a prompt that succeeds sometimes.

    References:
        | Knapsack RL: Unlocking Exploration of LLMs via Optimizing Budget Allocation (Li et al., 2025),
          https://arxiv.org/abs/2509.25849

    Example:
        >>> allocate(torch.tensor([torch.nan, 0.0, 0.5, 1.0]), budget=32)
        tensor([ 8, 16,  6,  2])
    """
    share = budget // len(rates)
    sometimes, never, unknown = (rates > 0) & (rates < 1), rates == 0, rates.isnan()
    if not (sometimes | never).any():
        return _spread(torch.full(rates.shape, share), budget, torch.ones_like(never))
    counts = torch.where(unknown, share, min(least, share))
    left = budget - int(counts.sum())
    excess = left - float(expected_need(rates[sometimes], most).sum())
    others = never if never.any() else ~sometimes
    if excess > 0 and others.any():
        counts = _spread(counts, budget - left + math.floor(excess), others)
        left -= math.floor(excess)
    if sometimes.any():
        start = min(least, share)
        wanted = left + start * int(sometimes.sum())
        counts[sometimes] = best_counts(rates[sometimes], wanted, start, max(most, start))
    return _spread(counts, budget, others if others.any() else sometimes)


def _spread(counts: Tensor, budget: int, over: Tensor) -> Tensor:
    """What is missing to the budget, evenly over some of the prompts; the first get what is left over."""
    each, further = divmod(budget - int(counts.sum()), int(over.sum()))
    return counts + over * each + (over & (over.cumsum(0) <= further))
