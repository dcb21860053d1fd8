"""Gates: the coefficient of A ∇log π of each token, as a function of the experience."""

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor

from grade_lightning.records import Experience

Gate: TypeAlias = Callable[[Tensor, Experience], Tensor]
"""(ratio, experience) → coefficient ≥ 0; ratio (B, T). It may look at advantages, old log-probabilities, turns …"""


def by_advantage(gate: Callable[..., Tensor], **settings: Any) -> Gate:
    """A gate of :mod:`grade_lightning.functional.gates`, which looks at the ratio and the advantage alone.

    Args:
        gate: the function.
        **settings: its further arguments, such as bounds.

    Example:
        >>> from grade_lightning.functional.gates import clipped
        >>> gate = by_advantage(clipped, low=0.8, high=1.2)
    """
    return lambda ratio, seen: gate(ratio, seen.advantages, **settings)


def complement(gate: Gate) -> Gate:
    """The ratio where a gate is 0, and 0 elsewhere: with a gate that clips, both lines together have no clip.

    Args:
        gate: the ratio, or 0.
    """
    return lambda ratio, seen: ratio.masked_fill(gate(ratio, seen) != 0, 0)
