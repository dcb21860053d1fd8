"""Dense rows: sequences of different length one after another in a few rows, so that little of them is padding."""

import heapq
from collections.abc import Sequence
from math import ceil
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor


class DenseRows(NamedTuple):
    """Where the N tokens of b sequences stand in r rows of n positions."""

    tokens: Int[Tensor, " N"]
    """Which of the b·l places of the sequences hold a token."""
    source: Int[Tensor, "r n"]
    """Which of those places stands here; 0 in padding."""
    positions: Int[Tensor, "r n"]
    """Position in its own sequence: at each sequence, and at the padding of a row, they start again from 0."""
    read: Int[Tensor, " N"]
    """Which of the r·n positions holds each token."""


def dense_rows(mask: Bool[Tensor, "b l"], rows: Int[Tensor, " b"]) -> DenseRows:
    """Put the tokens of sequences one after another.

    Args:
        mask: where the sequences have tokens.
        rows: the row of each sequence.

    Example:
        >>> packed = dense_rows(torch.tensor([[False, True, True], [True, False, False]]), torch.tensor([0, 0]))
        >>> packed.source, packed.positions
        (tensor([[1, 2, 3]]), tensor([[0, 1, 0]]))
        >>> packed.tokens, packed.read
        (tensor([1, 2, 3]), tensor([0, 1, 2]))
    """
    lengths = mask.sum(-1)
    order = rows.argsort(stable=True)
    before = torch.zeros_like(lengths)
    before[order] = lengths[order].cumsum(0) - lengths[order]  # tokens of earlier sequences, in all rows
    count = int(rows.max()) + 1
    used = lengths.new_zeros(count).index_add(0, rows, lengths)
    starts = before - (used.cumsum(0) - used)[rows]
    n = int(used.max())
    sequence, place = mask.nonzero(as_tuple=True)
    own = (mask.cumsum(-1) - 1)[sequence, place]
    read = rows[sequence] * n + starts[sequence] + own
    tokens = sequence * mask.shape[1] + place
    source = tokens.new_zeros(count * n).index_copy(0, read, tokens).view(count, n)
    padding = (torch.arange(n) - used.unsqueeze(1)).clamp(min=0).flatten()
    return DenseRows(tokens, source, padding.index_copy(0, read, own).view(count, n), read)


def cheapest_rows(lengths: Sequence[int], padded: int, width: int, square: bool = True) -> list[int] | None:
    """The row of each sequence such that a forward pass costs least; None: as they are, one a row, costs no more.

    A row of n tokens costs n linear layers and n² pairs of positions, of which about 3·width cost as much as the linear
    layers of one token (measured on a CPU, under a mask, at SmolLM2's width). With fewer rows there is less padding and
    there are more pairs. Each number of rows that divides the sequences about evenly is tried; the longest sequences go
    first, each into the row that is least full.

    Args:
        lengths: tokens of each sequence.
        padded: positions that each has now.
        width: of the hidden states.
        square: whether attention computes all pairs of a row; else only those of each sequence.

    Example:
        >>> cheapest_rows([9, 2, 3, 4], padded=12, width=256)
        [0, 1, 1, 1]
        >>> cheapest_rows([9, 9], padded=9, width=256) is None
        True
    """
    if not square:
        return [0] * len(lengths) if sum(lengths) < len(lengths) * padded else None
    best, found = _cost(len(lengths), padded, width), None
    for count in sorted({ceil(len(lengths) / k) for k in range(1, len(lengths) + 1)}):
        rows, longest = _fill(lengths, count)
        if (cost := _cost(count, longest, width)) < best:
            best, found = cost, rows
    return found


def _cost(rows: int, tokens: int, width: int) -> int:
    return rows * tokens * (3 * width + tokens)


def _fill(lengths: Sequence[int], count: int) -> tuple[list[int], int]:
    """The row of each sequence, and the tokens of the fullest row."""
    fullness, rows = [(0, row) for row in range(count)], [0] * len(lengths)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        filled, row = fullness[0]
        heapq.heapreplace(fullness, (filled + lengths[i], row))
        rows[i] = row
    return rows, max(filled for filled, _ in fullness)
