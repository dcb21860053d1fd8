"""A penalty for completions that are too long."""

from dataclasses import dataclass

from torch import Tensor

from grade_lightning.errors import check_range
from grade_lightning.functional.penalties import overlong_penalty
from grade_lightning.records import Rollout


@dataclass(frozen=True)
class OverlongPenalty:
    """Added to the reward after the selection of completions, for which it does not count.

    Args:
        buffer: over how many tokens before the longest completion the penalty grows from 0 to 1; a fifth of them by
            default, as in the paper; 0: no penalty.

    References:
        | DAPO: An Open-Source LLM Reinforcement Learning System at Scale (Yu et al., 2025),
          https://arxiv.org/abs/2503.14476
    """

    buffer: int | None = None

    def __post_init__(self) -> None:
        """Check the number."""
        check_range("[0, inf)", "length_penalty", buffer=self.buffer)

    def __call__(self, rollout: Rollout, longest: int) -> Tensor | None:
        """What is added to each reward, (B,), where `longest` is the most tokens; None: nothing."""
        buffer = longest // 5 if self.buffer is None else self.buffer
        return overlong_penalty(rollout.lengths, longest, buffer) if buffer else None
