"""What evaluation finds of each completion."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from grade_lightning.numerics import finite_or_none

from .rollout import Rollout


@dataclass
class Evaluation:
    """One batch of completions that were sampled and measured; each figure (B,)."""

    rollout: Rollout
    reward: Tensor
    kl: Tensor
    """Nats per sequence."""
    entropy: Tensor
    """Nats per token."""
    length: Tensor
    """Sampled tokens."""
    ended: Tensor
    """Whether the completion ended by itself."""
    ref_nll: Tensor
    """Negative log-likelihood under the reference, nats per sequence."""
    parts: dict[str, Tensor]
    """The value of each reward and judge."""

    def rows(self) -> list[dict[str, Any]]:
        """One dictionary for each completion, as JSON can hold it: None for a number that is not finite."""
        figures = {name: getattr(self, name).tolist() for name in ("reward", "kl", "length", "ended", "ref_nll")}
        parts = {name: value.tolist() for name, value in self.parts.items()}
        return [
            {"prompt": prompt, "completion": completion}
            | {name: finite_or_none(values[i]) for name, values in figures.items()}
            | {"rewards": {name: finite_or_none(values[i]) for name, values in parts.items()}}
            for i, (prompt, completion) in enumerate(zip(self.rollout.prompts, self.rollout.completions, strict=True))
        ]
