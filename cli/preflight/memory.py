"""The bytes of tensors: those alive at the same time, and those that a run needs at a batch size."""

import math
import weakref
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PHASES = {
    "sampling": "sampling",
    "reward": "scoring",
    "policy": "policy's pass",
    "reference": "reference's pass",
    "vocabulary": "pass over the vocabulary",
    "hops": "hops",
    "loss": "rest of the loss",
    "backward": "backward pass",
    "optimizer": "optimizer step",
}
"""Phases of a step, most of them by the names that a profiler sees, and what they are called in the table."""


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of the tensors that are made under it and are alive at the same time.

    Views count once, and tensors that were there before do not count.

    Example:
        >>> with LiveTensors() as live:
        ...     kept = torch.zeros(3) + torch.zeros(3)
        >>> live.now, live.peaks
        (12, Counter({'loss': 36}))
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.phase = "loss"
        """Of all that is in none of the phases that have a name for the profiler."""
        self.peaks: Counter[str] = Counter()
        """Most bytes that were alive in each phase."""
        self._known: set[int] = set()
        self._entered: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.profiler._record_function_enter_new.default:  # the phases that a profiler sees
            self._entered.append(args[0])
        elif func is torch.ops.profiler._record_function_exit._RecordFunction and self._entered:
            self._entered.pop()
        self._see((args, kwargs), new=False)
        result = func(*args, **kwargs or {})
        self._see(result, new=True)
        return result

    def _see(self, values: Any, new: bool) -> None:
        for tensor in tree_leaves(values):
            if not isinstance(tensor, Tensor):
                continue
            storage: Any = tensor if tensor.is_mkldnn else tensor.untyped_storage()  # oneDNN's own layout has none
            if storage._cdata not in self._known:
                size = (tensor.nbytes if tensor.is_mkldnn else storage.nbytes()) if new else 0
                self._known.add(storage._cdata)
                weakref.finalize(storage, self._forget, storage._cdata, size)
                self.now += size
                phase = next((name for name in reversed(self._entered) if name in PHASES), self.phase)
                self.peaks[phase] = max(self.peaks[phase], self.now)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@dataclass(frozen=True)
class Line:
    """Bytes that a phase needs at a batch size."""

    fixed: float
    slope: float

    @classmethod
    def through(cls, one: tuple[int, int], two: tuple[int, int]) -> "Line":
        """The line through two measurements, each a batch size and bytes.

        Example:
            >>> Line.through((2, 50), (4, 90))
            Line(fixed=10.0, slope=20.0)
        """
        slope = max(0.0, (two[1] - one[1]) / (two[0] - one[0]))
        return cls(two[1] - slope * two[0], slope)

    def __call__(self, size: int) -> float:
        """Bytes at this batch size."""
        return max(0.0, self.fixed + self.slope * size)

    def largest(self, room: float) -> float:
        """The batch size that needs so many bytes.

        Example:
            >>> Line(10, 20).largest(100), Line(10, 0).largest(100), Line(10, 0).largest(5)
            (4.5, inf, -inf)
        """
        left = room - self.fixed
        return left / self.slope if self.slope else math.copysign(math.inf, left)


@dataclass
class Memory:
    """What a run needs, in bytes."""

    parts: dict[str, int]
    """Whatever the batch."""
    phases: dict[str, Line]
    """Beside that, in each phase of a step."""
    unit: int
    """Batch sizes are multiples of this."""

    def total(self, size: int) -> float:
        """At a batch size."""
        return sum(self.parts.values()) + max(line(size) for line in self.phases.values())

    def largest(self, room: float) -> int:
        """The largest batch size for which so many bytes are enough; 0 if there is none.

        Example:
            >>> Memory({"weights": 100}, {"training": Line(10, 20), "reward": Line(0, 1)}, unit=4).largest(300)
            8
        """
        left = room - sum(self.parts.values())
        size = min(line.largest(left) for line in self.phases.values())
        return int(min(max(size, 0), 2**20) // self.unit * self.unit)


def storage_bytes(tensors: list[Tensor]) -> int:
    """Bytes of tensors; memory that several share counts once.

    Example:
        >>> x = torch.zeros(3)
        >>> storage_bytes([x, x[:1], torch.zeros(2)])
        20
    """
    return sum({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}.values())
