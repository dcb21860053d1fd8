"""Pairs with reasoning traces beside pairs without: how much each kind counts."""

from typing import Any, Literal

import torch
from torch import Tensor

from grade_lightning.errors import InputError, check_range
from grade_lightning.records import Experience, Rollout, StepOutput
from grade_lightning.strategies import FSDP2

from .preference import PreferenceModule

EVERY = 10
"""Optimizer steps from one measurement of the variances to the next."""
DECAY = 0.9
"""Of the moving averages of the measurements."""


class TracedModule(PreferenceModule):
    """Weighs pairs whose completions have a reasoning trace against pairs whose trace was left empty.

    Args:
        trace_weight: α in [0, 1]: of the mean over the pairs whose column `trace` is true; 1 − α is of that over the
            others. `variance`: the α with which the gradient of the sum varies least, by measurements of both kinds.
            None: all pairs count the same, and there is no such column.
        **kwargs: those of :class:`PreferenceModule`.
    """

    def __init__(self, trace_weight: float | Literal["variance"] | None = None, **kwargs: Any) -> None:
        if not isinstance(trace_weight, str):
            check_range("[0, 1]", trace_weight=trace_weight)
        super().__init__(**kwargs)
        if trace_weight is not None and self.pairs != "data":
            raise InputError(
                "trace_weight: weighs pairs by their column 'trace', which only the data have; set pairs to data"
            )
        self.trace_weight = trace_weight
        self._noise = torch.zeros(2, 2)  # of both kinds: decayed sums of variances, and of their number
        self._differences: list[tuple[Tensor, Tensor]] | None = None

    def setup(self, stage: str) -> None:
        """Check the strategy."""
        super().setup(stage)
        if self.trace_weight == "variance" and isinstance(self.trainer.strategy, FSDP2):
            raise InputError(
                "--trainer.strategy: trace_weight = variance takes further gradients of the same pass, for which fsdp2 "
                "has no whole weights; use ddp, or a number"
            )

    @property
    def alpha(self) -> float:
        """α of the next step; 1/2 before both variances are known."""
        if isinstance(self.trace_weight, float | int):
            return float(self.trace_weight)
        (traced, empty), known = self._noise[:, 0] / self._noise[:, 1], self._noise[:, 1].all()
        return float(empty / (traced + empty)) if known and traced + empty > 0 else 0.5

    def average(self, losses: Tensor, rollout: Rollout) -> Tensor:
        """α times the mean over the pairs with traces of all processes, and 1 − α times that over the others."""
        if self.trace_weight is None:
            return super().average(losses, rollout)
        traced = _traces(rollout, len(losses)).to(losses.device)
        kinds = torch.stack([traced, ~traced])
        counts = self.reduce.mean(kinds.sum(-1)).clamp(min=1 / len(losses))
        if self._differences is not None:
            self._differences = [_difference(losses, kind) for kind in kinds]
        shares = losses.new_tensor([self.alpha, 1 - self.alpha]) / counts.to(losses)
        return (losses * torch.where(traced, shares[0], shares[1])).sum()

    def loss(self, experience: Experience) -> StepOutput:
        """Mean loss over the pairs, each kind with its weight."""
        step = super().loss(experience)
        if self.trace_weight is not None:
            step.metrics["trace_weight"] = step.loss.new_tensor(self.alpha)
        return step

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The loss; now and then the variances of both kinds' gradients are measured here."""
        due = self.trace_weight == "variance" and self.global_step % EVERY == 0
        self._differences = [] if due else None
        loss = super().training_step(batch, batch_idx)
        if self._differences:
            found = torch.stack([self._variance(*difference) for difference in self._differences])
            found = self.reduce.sum(found).cpu()
            self._noise = torch.where(found[:, 1:] > 0, DECAY * self._noise + found, self._noise)
        self._differences = None
        return loss

    def _variance(self, difference: Tensor, factor: Tensor) -> Tensor:
        """Variance of the gradient of a kind's mean, summed over all weights, and 1; zeros where there is none."""
        trained = [p for p in self.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(difference, trained, retain_graph=True, allow_unused=True)
        size = torch.stack([x.float().square().sum() for x in gradients if x is not None]).sum()
        known = (factor > 0) & size.isfinite()
        return torch.where(known, torch.stack([size * factor, torch.ones_like(size)]), 0.0)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the measurements."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["grade_lightning"]["trace_noise"] = self._noise

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore them."""
        super().on_load_checkpoint(checkpoint)
        self._noise = checkpoint["grade_lightning"].get("trace_noise", self._noise)


def _difference(losses: Tensor, kind: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over one half of a kind's pairs less that over the other half, and what makes a variance of its square.

    The variance is that of the mean over all pairs of the kind: E|g_a − g_b|² n_a n_b / n².
    """
    second = kind & (kind.cumsum(0) % 2 == 0)
    halves = torch.stack([kind & ~second, second]).to(losses)
    counts = halves.sum(-1)
    one, two = (halves * losses).sum(-1) / counts.clamp(min=1)
    return one - two, counts.prod() / counts.sum().clamp(min=1).square()


def _traces(rollout: Rollout, pairs: int) -> Tensor:
    """Which pairs have traces, (b,)."""
    values = rollout.columns.get("trace")
    if values is None:
        raise InputError(
            "data.source: no column 'trace' for trace_weight; add it, true where the completions have a reasoning trace"
        )
    for value in values[:pairs]:
        if value not in (True, False):
            raise InputError(f"column 'trace': {value!r:.60} is neither true nor false; fix the row or drop it")
    return torch.tensor([bool(value) for value in values[:pairs]])
