"""What is accepted where a policy is meant."""

from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from grade_lightning.errors import InputError

from .policy import Policy

if TYPE_CHECKING:
    PolicyLike = Policy | PreTrainedModel | str | Path
    """A policy, a model in memory, or the name or folder of one."""
else:  # the command line makes policies
    PolicyLike = Policy


def as_policy(value: "PolicyLike | None") -> Policy:
    """The policy that is meant; the bundled one by default.

    Raises:
        InputError: it is none of these.

    Example:
        >>> as_policy("gpt2").path
        'gpt2'
    """
    if isinstance(value, Policy):
        return value
    if isinstance(value, PreTrainedModel):
        return Policy.from_model(value)
    if value is None or isinstance(value, str | Path):
        return Policy() if value is None else Policy(str(value))
    raise InputError(
        f"policy: {type(value).__name__} is not a policy; give a Policy, a model of transformers, or the name or "
        "folder of one"
    )
