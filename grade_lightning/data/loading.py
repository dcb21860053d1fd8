"""The training loader: shuffled anew each epoch, and resumed at its place."""

from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader, RandomSampler


class EpochSampler(RandomSampler):
    """Shuffle by seed and epoch, so that a resumed run sees the order that it would have seen.

    Lightning calls `set_epoch`, and puts its DistributedSampler in this one's place where it needs to.
    """

    def __init__(self, rows: Dataset, seed: int) -> None:
        super().__init__(rows, generator=torch.Generator())
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self.seed + self.epoch)
        return super().__iter__()


class ResumableLoader(DataLoader[Any]):
    """A loader that gives out each batch `repeats` times in a row, and whose place goes into Lightning's checkpoints.

    Its length and its place count the batches given out.
    """

    _skip = 0
    _given = 0

    def __init__(self, dataset: Dataset, repeats: int = 1, **options: Any) -> None:
        super().__init__(dataset, **options)
        self.repeats = repeats  # Lightning looks for this name when it builds the loader anew for its own sampler

    def __len__(self) -> int:
        return super().__len__() * self.repeats

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        skip, self._skip = self._skip, 0
        given = (batch for batch in super().__iter__() for _ in range(self.repeats))
        for self._given, batch in enumerate(given, 1):
            if self._given > skip:
                yield batch

    def state_dict(self) -> dict[str, int]:
        """Say how many batches of the epoch were given out."""
        return {"given": self._given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begin the next epoch after that many batches, or at its start if they were all."""
        self._skip = state["given"] % len(self)
