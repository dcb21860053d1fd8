"""Groups of completions of one prompt, which may differ in size, as a table padded with NaN."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor


class Groups(NamedTuple):
    """Where each of b completions stands in a table of p prompts by g completions.

    Every function of :mod:`.advantages` takes NaN for "no such completion", so it also takes groups of different sizes.
    """

    row: Int[Tensor, " b"]
    """The prompt of each completion, from 0 to p − 1."""
    column: Int[Tensor, " b"]
    """How many completions of the same prompt precede it."""
    shape: tuple[int, int]
    """(p, g), g the size of the largest group."""

    def table(self, values: Float[Tensor, " b"]) -> Float[Tensor, "p g"]:
        """Values of the completions as a table; NaN where a group is smaller than the largest.

        Example:
            >>> group_by(torch.tensor([4, 7, 7])).table(torch.tensor([1.0, 2.0, 3.0]))
            tensor([[1., nan],
                    [2., 3.]])
        """
        empty = values.new_full(self.shape, torch.nan)
        return empty.index_put((self.row.to(values.device), self.column.to(values.device)), values)

    def rows(self, table: Float[Tensor, "p g"]) -> Float[Tensor, " b"]:
        """The inverse of :meth:`table`."""
        return table[self.row.to(table.device), self.column.to(table.device)]

    def spread(self, values: Shaped[Tensor, " p"]) -> Shaped[Tensor, " b"]:
        """Values of the prompts, at each of their completions.

        Example:
            >>> group_by(torch.tensor([7, 4, 7])).spread(torch.tensor([1.0, 2.0]))
            tensor([2., 1., 2.])
        """
        return values[self.row.to(values.device)]


def group_by(labels: Int[Tensor, " b"]) -> Groups:
    """Group completions by the label of their prompt, in the order of the labels.

    Example:
        >>> group_by(torch.tensor([7, 4, 7]))
        Groups(row=tensor([1, 0, 1]), column=tensor([0, 0, 1]), shape=(2, 2))
    """
    _, row, sizes = labels.unique(return_inverse=True, return_counts=True)
    column = (row.unsqueeze(1) == row).tril(-1).sum(1)
    return Groups(row, column, (len(sizes), int(sizes.max()) if len(sizes) else 0))
