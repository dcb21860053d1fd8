"""Levels: over which stretch of a completion a ratio is taken, as a function of the experience."""

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor

from grade_lightning.functional import ratios
from grade_lightning.records import Experience

Level: TypeAlias = Callable[[Tensor, Experience], Tensor]
"""(values, experience) → means over each stretch, spread over its tokens; values (B, T)."""


def token_level(values: Tensor, seen: Experience) -> Tensor:
    """Each token by itself."""
    return values


def sequence_level(values: Tensor, seen: Experience) -> Tensor:
    """The whole completion."""
    return ratios.sequence_level(values, seen.sampled)


def turn_level(values: Tensor, seen: Experience) -> Tensor:
    """Each turn; a rollout without turns is one turn."""
    turns = seen.rollout.turns
    return (
        ratios.sequence_level(values, seen.sampled) if turns is None else ratios.turn_level(values, seen.sampled, turns)
    )
