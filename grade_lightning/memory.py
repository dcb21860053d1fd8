"""A memory of prompts: a few numbers for each, by the prompt's tokens, the same on all processes."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from grade_lightning.distributed import Reduce
from grade_lightning.errors import check_range
from grade_lightning.stateful import Stateful

Merge = Callable[[Tensor | None, Tensor], Tensor]
"""(what is known or None, what was seen) → what is known then; both (n,)."""


class PromptMemory(Stateful):
    """Numbers of each prompt that was seen; the longest unseen are forgotten.

    In the next epoch a prompt may come to another process, so all of them keep the same table.

    Args:
        capacity: prompts at most.

    Example:
        >>> memory = PromptMemory()
        >>> memory.update([7], torch.tensor([[0.5]]), lambda known, new: new)
        >>> memory.get(7), memory.get(8)
        (tensor([0.5000], dtype=torch.float64), None)
    """

    def __init__(self, capacity: int = 1_000_000) -> None:
        check_range("[1, inf)", "memory", capacity=capacity)
        self.capacity = capacity
        self._known: OrderedDict[int, Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: int) -> Tensor | None:
        """What is known of a prompt, (n,), float64; None: nothing.

        Args:
            key: one of :attr:`Prompts.keys`.
        """
        return self._known.get(key)

    def update(self, keys: list[int], values: Tensor, merge: Merge, reduce: Reduce | None = None) -> None:
        """Add what was seen of some prompts; all processes must call it.

        Args:
            keys: of the prompts of this process.
            values: what was seen of each, (P, n).
            merge: makes one of what is known and what was seen.
            reduce: statistics over all processes.
        """
        own = list(zip(keys, values.double().cpu(), strict=True))
        seen = [pair for pairs in (reduce or Reduce()).gather(own) for pair in pairs]
        for key, new in sorted(seen, key=lambda pair: pair[0]):  # in the same order for any number of processes
            self._known[key] = merge(self._known.get(key), new)
            self._known.move_to_end(key)
        while len(self._known) > self.capacity:
            self._known.popitem(last=False)

    def state_dict(self) -> dict[str, Any]:
        """Keys and numbers, the longest unseen first."""
        values = torch.stack(list(self._known.values())) if self._known else torch.empty(0, 0)
        return {"keys": torch.tensor(list(self._known), dtype=torch.int64), "values": values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self._known = OrderedDict(zip(state["keys"].tolist(), state["values"].cpu().unbind(), strict=True))
