"""What several processes share: sums and means, whole states, and who writes."""

from typing import Any

import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.distributed.tensor import DTensor


class Reduce:
    """Statistics over all processes of a run.

    Args:
        trainer: the run's; None: there is one process.

    Example:
        >>> import torch
        >>> Reduce().sum(torch.tensor([1.0, 2.0])), Reduce().gather("a")
        (tensor([1., 2.]), ['a'])
    """

    def __init__(self, trainer: Trainer | None = None) -> None:
        self.trainer = trainer

    @property
    def processes(self) -> int:
        """How many there are."""
        return 1 if self.trainer is None else self.trainer.world_size

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the processes, element by element."""
        return self._reduced(values, "sum")

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the processes, element by element; a fraction of whole numbers, too."""
        return self._reduced(values if values.is_floating_point() else values.float(), "mean")

    def _reduced(self, values: Tensor, how: str) -> Tensor:
        if self.trainer is None:
            return values
        reduced = self.trainer.strategy.reduce(values.clone(), reduce_op=how)  # which writes into what it is given
        assert isinstance(reduced, Tensor)
        return reduced

    def gather(self, value: Any) -> list[Any]:
        """The objects of all processes, in their order."""
        if self.processes == 1:
            return [value]
        values = [None] * self.processes
        dist.all_gather_object(values, value)
        return values


def is_first_process() -> bool:
    """Whether this process writes what is written once."""
    return not dist.is_initialized() or dist.get_rank() == 0


def gather_full_state(state: dict[str, Any]) -> dict[str, Any]:
    """The same with whole tensors in place of those that are spread over processes.

    All processes must call it. The first has the tensors, in its own memory; the others have empty ones.

    Example:
        >>> import torch
        >>> gather_full_state({"step": 1, "weight": torch.ones(2)})
        {'step': 1, 'weight': tensor([1., 1.])}
    """

    def gather(tensor: DTensor) -> Tensor:
        full = tensor.full_tensor()
        return full.cpu() if is_first_process() else full.new_empty(0)

    gathered: dict[str, Any] = apply_to_collection(state, DTensor, gather)
    return gathered
