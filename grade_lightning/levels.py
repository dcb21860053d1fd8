"""Levels: over which stretch of a completion a ratio is taken, as a function of the experience."""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from grade_lightning.functional import ratios
from grade_lightning.functional.turns import turns_after
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


def turns_by(separator: str) -> Level:
    """Each turn; where nobody numbers them, a token whose text has the separator in it ends one.

    Args:
        separator: text; every token has an empty one in it.
    """
    known: dict[int, Tensor] = {}  # by the tokenizer's size: which of its tokens end a turn

    def level(values: Tensor, seen: Experience) -> Tensor:
        rollout = seen.rollout
        if rollout.turns is not None:
            return turn_level(values, seen)
        size = len(rollout.tokenizer)
        if size not in known:
            texts = rollout.tokenizer.batch_decode([[token] for token in range(size)])
            known[size] = torch.tensor([separator in text for text in texts])
        known[size] = known[size].to(values.device)
        ends = known[size][rollout.completion_ids.clamp(max=size - 1)]
        return ratios.turn_level(values, seen.sampled, turns_after(ends))

    return level
