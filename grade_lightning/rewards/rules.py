"""Rewards that are Python functions."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from grade_lightning.errors import InputError
from grade_lightning.rollouts import Rollout

from .base import Reward


class FunctionReward(Reward):
    """A Python function `f(prompts, completions, **columns) -> list[float | None]`, as in TRL.

    Args:
        function: the function, or its dotted path in YAML. It gets the texts and every other column of the data by
            keyword, and returns one number for each completion; None abstains. A step in which one is infinite or NaN
            is left out.

    Example:
        >>> def shortness(prompts, completions, **columns):
        ...     return [-len(text) for text in completions]
        >>> FunctionReward(shortness).name
        'shortness'
    """

    def __init__(self, function: Callable[..., list[float | None]]) -> None:
        super().__init__()
        self.function = function

    @property
    def name(self) -> str:
        """The function's name."""
        return getattr(self.function, "__name__", type(self.function).__name__)

    def forward(self, rollout: Rollout) -> Tensor:
        """Call the function.

        Raises:
            InputError: it raises, or does not return one number or None for each completion.
        """
        columns = {key: value for key, value in rollout.columns.items() if key not in ("prompts", "completions")}
        try:
            values = self.function(prompts=rollout.prompts, completions=rollout.completions, **columns)
        except Exception as error:
            reason = " ".join(str(error).split())
            raise InputError(f"reward {self.name}: the function raised {type(error).__name__}: {reason}") from error
        try:
            scores = [math.nan if value is None else _number(value) for value in values]
        except (TypeError, ValueError) as error:
            raise InputError(f"reward {self.name}: must return a list of numbers or None ({error})") from error
        if len(scores) != len(rollout.completions):
            raise InputError(f"reward {self.name}: {len(scores)} values for {len(rollout.completions)} completions")
        return torch.tensor(scores, dtype=torch.float32, device=rollout.completion_ids.device)


def _number(value: float) -> float:
    """A NaN that the function computed is a mistake and no abstention."""
    return math.inf if math.isnan(value) else float(value)
