"""Schedules of the temperature τ over training."""

import math
from abc import ABC, abstractmethod

from grade_lightning.errors import check_range


class Schedule(ABC):
    """A value that depends on the progress of training.

    Args:
        start: value at the first step.
        end: value from step `steps` on.
        steps: length in optimizer steps; the whole run by default.
    """

    def __init__(self, start: float = 2.0, end: float = 0.5, steps: int | None = None) -> None:
        check_range("(0, inf)", type(self).__name__, start=start, end=end)
        check_range("[1, inf)", type(self).__name__, steps=steps)
        self.start = start
        self.end = end
        self.steps = steps

    def __call__(self, step: int, total: int) -> float:
        """Value at optimizer step `step` of a run of `total` steps (0 or less if unknown)."""
        length = self.steps if self.steps is not None else total
        return self.value(min(step / length, 1.0) if length > 0 else 0.0)

    @abstractmethod
    def value(self, progress: float) -> float:
        """Value at `progress` from 0 to 1."""


class Constant(Schedule):
    """The same value always.

    Example:
        >>> Constant(0.7)(step=5, total=10)
        0.7
    """

    def __init__(self, start: float = 1.0) -> None:
        super().__init__(start, start)

    def value(self, progress: float) -> float:
        """The constant."""
        return self.start


class Linear(Schedule):
    """A straight line; 2.0 to 0.5 is the paper's.

    References:
        | GRADE (Nel, 2025), https://arxiv.org/abs/2601.11574

    Example:
        >>> Linear(2.0, 0.5)(step=50, total=100)
        1.25
    """

    def value(self, progress: float) -> float:
        """Linear interpolation."""
        return self.start + (self.end - self.start) * progress


class Cosine(Schedule):
    """Half a cosine wave: slow at both ends.

    Example:
        >>> round(Cosine(2.0, 0.5)(step=50, total=100), 6)
        1.25
    """

    def value(self, progress: float) -> float:
        """Cosine interpolation."""
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * progress)) / 2


class Exponential(Schedule):
    """The same factor at every step.

    Example:
        >>> Exponential(2.0, 0.5)(step=50, total=100)
        1.0
    """

    def value(self, progress: float) -> float:
        """Geometric interpolation."""
        return self.start * math.exp(progress * math.log(self.end / self.start))
