"""Packing: the completions of a prompt behind one copy of it, in one row."""

from math import ceil
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from .groups import group_by


class Packing(NamedTuple):
    """Where the inputs of b sequences (p prompt tokens, t of the completion) stand in r rows of n positions.

    A row is a prompt, then its completions one after another, then padding. The last token of a completion is no input:
    nothing is predicted from it.
    """

    source: Int[Tensor, "r n"]
    """Which of the b·(p + t) tokens stands there; 0 in padding."""
    positions: Int[Tensor, "r n"]
    """Its position in its own sequence: after each completion they start again at the end of the prompt."""
    segments: Int[Tensor, "r n"]
    """0 in the prompt, i in the i-th completion, −1 in padding."""
    read: Int[Tensor, "b t"]
    """Which of the r·n positions predicts each completion token; for the first it is the prompt's last."""


def pack(
    prompts: Int[Tensor, " b"], completions: Int[Tensor, " b"], labels: Int[Tensor, " b"], p: int, t: int
) -> Packing:
    """Pack sequences of which the prompt stands at the end of its p positions, the completion at the start of its t.

    Args:
        prompts: tokens of each prompt.
        completions: tokens of each completion.
        labels: the same for the sequences of a row, which have the same prompt.
        p: width of the prompts with their padding.
        t: width of the completions with theirs.

    References:
        | Prefix Grouper: Efficient GRPO Training through Shared-Prefix Forward (Liu et al., 2025),
          https://arxiv.org/abs/2506.05433

    Example:
        >>> packed = pack(torch.tensor([2, 2]), torch.tensor([3, 2]), torch.tensor([0, 0]), p=2, t=3)
        >>> packed.positions, packed.segments
        (tensor([[0, 1, 2, 3, 2]]), tensor([[0, 0, 1, 1, 2]]))
        >>> packed.read
        tensor([[1, 2, 3],
                [1, 4, 4]])
    """
    row, column, shape = group_by(labels)
    inputs = (completions - 1).clamp(min=0)
    prompt = prompts.new_zeros(shape[0]).index_put((row,), prompts)
    taken = inputs.new_zeros(shape).index_put((row, column), inputs)
    starts = (prompt.unsqueeze(1) + taken.cumsum(1) - taken)[row, column]
    n = int((prompt + taken.sum(1)).max())
    source, positions = torch.zeros(2, shape[0], n, dtype=torch.long)
    segments = torch.full((shape[0], n), -1)

    first = (column == 0).nonzero().squeeze(1)
    which, offset = (torch.arange(p) < prompts[first].unsqueeze(1)).nonzero(as_tuple=True)
    which = first[which]
    source[row[which], offset] = which * (p + t) + p - prompts[which] + offset
    positions[row[which], offset] = offset
    segments[row[which], offset] = 0

    which, offset = (torch.arange(t) < inputs.unsqueeze(1)).nonzero(as_tuple=True)
    place = starts[which] + offset
    source[row[which], place] = which * (p + t) + p + offset
    positions[row[which], place] = prompts[which] + offset
    segments[row[which], place] = column[which] + 1

    before = torch.minimum(torch.arange(t) - 1, inputs.unsqueeze(1) - 1)  # what lies behind the end is read from it
    read = torch.where(before < 0, (prompts - 1).unsqueeze(1), starts.unsqueeze(1) + before)
    return Packing(source, positions, segments, row.unsqueeze(1) * n + read)


def completions_per_row(p: int, t: int, most: int, width: int) -> int:
    """With how many completions behind it a copy of the prompt costs least.

    A row of n = p + k·t tokens costs n linear layers and n² pairs of positions, of which about 6·width cost as much as
    the linear layers of one token (measured on CPUs): n (6·width + n) for each copy, of rows that are about even.

    Args:
        p: tokens of the prompt.
        t: tokens of a completion.
        most: completions of the prompt.
        width: of the hidden states.

    Example:
        >>> completions_per_row(p=512, t=32, most=16, width=256), completions_per_row(p=32, t=512, most=16, width=256)
        (16, 1)
    """
    even = sorted({ceil(most / copies) for copies in range(1, most + 1)})
    return min(even, key=lambda k: ceil(most / k) * (p + k * t) * (6 * width + p + k * t))


def block_causal(segments: Int[Tensor, "r n"]) -> Bool[Tensor, "r n n"]:
    """What each position of a packed row sees: the prompt and its own completion, up to itself.

    Example:
        >>> block_causal(torch.tensor([[0, 1, 1, 2]])).int()
        tensor([[[1, 0, 0, 0],
                 [1, 1, 0, 0],
                 [1, 1, 1, 0],
                 [1, 0, 0, 1]]], dtype=torch.int32)
    """
    key = segments.unsqueeze(1)
    return ((key == 0) | (key == segments.unsqueeze(2))).tril()
