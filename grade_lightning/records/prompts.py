"""Prompts: what a rollout starts from."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from grade_lightning.numerics import hash_seed


@dataclass
class Prompts:
    """Tokenised prompts. P prompts of at most L tokens, padded on the left."""

    ids: Tensor
    """(P, L)"""
    mask: Tensor
    """(P, L), 0 for padding."""
    columns: dict[str, list[Any]] = field(default_factory=dict)
    """The other columns of the rows, handed to reward functions by name."""

    @classmethod
    def of(cls, batch: dict[str, Any]) -> "Prompts":
        """Those of a `PromptBatch`, as the loader gives it."""
        return cls(batch["input_ids"], batch["attention_mask"], batch.get("columns", {}))

    def __len__(self) -> int:
        return len(self.ids)

    def slice(self, start: int, count: int) -> "Prompts":
        """`count` of them in a row."""
        taken = slice(start, start + count)
        columns = {name: values[taken] for name, values in self.columns.items()}
        return Prompts(self.ids[taken], self.mask[taken], columns)

    def repeat(self, counts: Tensor) -> "Prompts":
        """Each prompt as often as `counts`, (P,), says, in a row.

        Example:
            >>> prompts = Prompts(torch.tensor([[5], [6]]), torch.ones(2, 1), {"label": [0, 1]})
            >>> prompts.repeat(torch.tensor([1, 2])).columns
            {'label': [0, 1, 1]}
        """
        rows = torch.arange(len(self)).repeat_interleave(counts)
        columns = {name: [values[i] for i in rows.tolist()] for name, values in self.columns.items()}
        rows = rows.to(self.ids.device)
        return Prompts(self.ids[rows], self.mask[rows], columns)

    @property
    def keys(self) -> list[int]:
        """:func:`prompt_keys` of them."""
        return prompt_keys(self.ids, self.mask)


def prompt_keys(ids: Tensor, mask: Tensor) -> list[int]:
    """A number for each prompt that depends on its tokens alone: the same in every batch and on every machine.

    Args:
        ids: (P, L).
        mask: (P, L), 0 for padding.

    Example:
        >>> one, two = prompt_keys(torch.tensor([[0, 5], [7, 5]]), torch.tensor([[0, 1], [1, 1]]))
        >>> one == prompt_keys(torch.tensor([[5]]), torch.ones(1, 1))[0] != two
        True
    """
    rows = zip(ids.cpu(), mask.bool().cpu(), strict=True)
    return [hash_seed(*row[keep].tolist()) for row, keep in rows]
