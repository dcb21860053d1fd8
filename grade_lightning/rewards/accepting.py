"""What is accepted where a reward is meant."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grade_lightning.errors import InputError
from grade_lightning.policies.loading import BUNDLED

from .base import Reward
from .classifier import HEAD_CONFIG, ClassifierReward
from .functions import FunctionReward
from .sequence_reward import SequenceClassifierReward
from .weighted_sum import WeightedSum

if TYPE_CHECKING:
    RewardLike = Reward | Callable[..., Any] | str | Path | Sequence["Reward | Callable[..., Any] | str | Path"]
    """A reward, a function, the name or folder of a classifier, or several of them, which are added."""
else:  # the command line makes rewards
    RewardLike = Reward


def as_reward(value: "RewardLike") -> Reward:
    """The reward that is meant.

    Raises:
        InputError: it is none of these.

    Example:
        >>> def brevity(prompts, completions, **columns):
        ...     return [-len(text) for text in completions]
        >>> as_reward(brevity).name, as_reward([brevity, "bundled"]).name
        ('brevity', 'WeightedSum')
    """
    if isinstance(value, Reward):
        return value
    if isinstance(value, str | Path):
        ours = str(value) == BUNDLED or (Path(value) / HEAD_CONFIG).is_file()
        return ClassifierReward(str(value)) if ours else SequenceClassifierReward(str(value))
    if callable(value):
        return FunctionReward(value)
    if isinstance(value, Sequence):
        return WeightedSum([as_reward(part) for part in value])
    raise InputError(
        f"reward: {type(value).__name__} is not a reward; give a Reward, a function, the name or folder of a "
        "classifier, or a list of these"
    )
