"""Turns within a completion that nobody numbered: a new one begins after each separator."""

from jaxtyping import Bool, Int
from torch import Tensor


def turns_after(separators: Bool[Tensor, "b t"]) -> Int[Tensor, "b t"]:
    """The turn that each token belongs to, from 0; a separator ends its turn.

    Example:
        >>> import torch
        >>> turns_after(torch.tensor([[False, True, True, False]]))
        tensor([[0, 0, 1, 2]])
    """
    return separators.long().cumsum(-1) - separators.long()
