"""Turns within a completion: where they begin if nobody numbered them, and where they end."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def turns_after(separators: Bool[Tensor, "b t"]) -> Int[Tensor, "b t"]:
    """The turn that each token belongs to, from 0; a separator ends its turn.

    Example:
        >>> import torch
        >>> turns_after(torch.tensor([[False, True, True, False]]))
        tensor([[0, 0, 1, 2]])
    """
    return separators.long().cumsum(-1) - separators.long()


def at_turn_ends(
    values: Float[Tensor, "b t"], mask: Bool[Tensor, "b t"], turns: Int[Tensor, "b t"]
) -> Float[Tensor, "b t"]:
    """Each turn's value at its last token of the mask, and 0 elsewhere.

    Args:
        values: of the turns, from turn 0 on; there are at most as many as tokens.
        mask: tokens that may have a value, such as those that the policy chose.
        turns: which turn each token belongs to.

    Example:
        >>> mask = torch.tensor([[True, True, False, True]])
        >>> at_turn_ends(torch.tensor([[5.0, 7.0, 0.0, 0.0]]), mask, torch.tensor([[0, 0, 0, 1]]))
        tensor([[0., 5., 0., 7.]])
    """
    places = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape).masked_fill(~mask, -1)
    last = torch.full_like(places, -1).scatter_reduce(1, turns, places, "amax")
    return values.gather(1, turns) * (mask & (last.gather(1, turns) == places))
