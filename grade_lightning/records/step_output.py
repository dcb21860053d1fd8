"""What a method makes of its experience."""

from dataclasses import dataclass, field

from torch import Tensor

from .experience import Experience
from .token_stats import TokenStats


@dataclass
class StepOutput:
    """A loss, and what is logged beside it."""

    loss: Tensor
    """The scalar that Lightning differentiates."""
    stats: TokenStats
    """Of the step's completions; no graph. `logps` are those of the training pass."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Further scalars, logged as `train/{name}`; a name with a slash is logged as it is."""
    experience: Experience | None = None
    """What the loss was made of, where the training pass added to it: measurements and advantages."""
