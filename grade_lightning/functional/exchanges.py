"""Exchanging tokens of a prompt: what each exchange would gain to first order, and which are tried."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def exchange_gains(
    gradient: Float[Tensor, "n w"], table: Float[Tensor, "v w"], tokens: Int[Tensor, " n"]
) -> Float[Tensor, "n v"]:
    """⟨∂objective/∂x_j, E_v − E_{p_j}⟩: the gain of token v in place of p_j, to first order, for all j and v at once.

    Args:
        gradient: of the objective at the inputs x of n tokens.
        table: E, what the network's embedding makes of each token.
        tokens: p.

    References:
        | HotFlip: White-Box Adversarial Examples for Text Classification (Ebrahimi et al., 2018),
          https://arxiv.org/abs/1712.06751

    Example:
        >>> exchange_gains(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0], [2.0, 0.0]]), torch.tensor([0]))
        tensor([[0., 2.]])
    """
    products = (gradient @ table.mT).to(torch.promote_types(gradient.dtype, torch.float32))
    return products - products.gather(1, tokens.unsqueeze(1))


def likely_tokens(logps: Float[Tensor, "n v"], allowed: Bool[Tensor, " v"], count: int) -> Bool[Tensor, "n v"]:
    """The `count` likeliest of the allowed tokens at each position.

    Example:
        >>> likely_tokens(torch.tensor([[0.1, 0.3, 0.2]]), torch.tensor([True, False, True]), 1)
        tensor([[False, False,  True]])
    """
    held = logps.masked_fill(~allowed, -torch.inf)
    best = held.topk(min(count, logps.shape[1]), dim=-1).indices
    return torch.zeros_like(held, dtype=torch.bool).scatter(1, best, True) & allowed


def best_exchanges(
    gains: Float[Tensor, "n v"],
    tokens: Int[Tensor, " n"],
    count: int,
    accept: Callable[[list[int]], bool] = lambda prompt: True,
) -> list[list[int]]:
    """The prompts that differ from this one in one token and gain most.

    Args:
        gains: of each token at each position; −∞ for one that is no candidate.
        tokens: the prompt; a token in its own place is no exchange.
        count: how many prompts.
        accept: whether a prompt may be tried.

    Example:
        >>> gains = torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, -torch.inf]])
        >>> best_exchanges(gains, torch.tensor([0, 1]), 2)
        [[1, 1], [0, 0]]
    """
    order = gains.scatter(1, tokens.unsqueeze(1), -torch.inf).flatten()
    found: list[list[int]] = []
    for at in order.argsort(descending=True, stable=True).tolist():
        if len(found) == count or order[at] == -torch.inf:
            break
        place, token = divmod(at, gains.shape[1])
        prompt = tokens.tolist()
        prompt[place] = token
        if accept(prompt):
            found.append(prompt)
    return found
