"""Extragradient: a step of trial, and the step itself from where the trial began, on what the trial's policy draws."""

from typing import Any

import torch
from lightning.pytorch.utilities.types import LRSchedulerTypeUnion
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from grade_lightning.errors import InputError
from grade_lightning.numerics import wide_numbers
from grade_lightning.records import Batching, Experience
from grade_lightning.strategies import FSDP2

from .pairwise import PairwiseModule


class ExtragradientModule(PairwiseModule):
    """Trains on each batch in two optimizer steps, of which the second begins at the same weights as the first.

    The first step is a trial: θ' = θ − η g(θ), on completions of π_θ. Then completions are drawn and compared with
    π_θ', weights and optimizer state of θ are restored, and the second step is taken from there. The copies lie in the
    memory of the processor. `max_steps` counts both steps, the scheduler counts pairs of them.

    Args:
        **kwargs: those of :class:`PairwiseModule`.
    """

    redraws = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if self.stateful():
            raise InputError(
                f"reward {self.reward.name}: moves with what is sampled, and {type(self).__name__} takes half of its "
                "steps back; use it with OnlineIPO"
            )
        self._start: dict[str, Any] | None = None  # in the middle of a pair of steps, where it began
        self._drawn: Experience | None = None

    @property
    def batching(self) -> Batching:
        """Two optimizer steps on the same prompts."""
        return Batching("prompts", self.num_generations, epochs=2, accumulation=self.accumulation())

    def setup(self, stage: str) -> None:
        """Check the strategy."""
        super().setup(stage)
        if isinstance(self.trainer.strategy, FSDP2):
            raise InputError(
                f"--trainer.strategy: {type(self).__name__} keeps a copy of the whole weights, and under fsdp2 no "
                "process has them; use ddp"
            )

    @wide_numbers()
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """One micro-batch of the trial, or of the step itself; the first of each draws for all."""
        self.seed("train", batch_idx)
        steps = self.accumulation()
        second, part = divmod(batch_idx % (2 * steps), steps)
        if part == 0 or self._drawn is None:
            if not second:
                self._start = self._copies()
            self._drawn = self.begin_step(batch)
            self._restore(second)
        rows = _parts(self._drawn, self.num_generations, steps)[part]
        seen = self._drawn if steps == 1 else self._drawn.select(rows)
        if part + 1 == steps:
            self._drawn = None
        return self.finish_step(seen, self.loss(seen))

    def _copies(self) -> dict[str, Any]:
        weights = {name: p.detach().to("cpu", copy=True) for name, p in self.named_parameters() if p.requires_grad}
        if self._trainer is None:
            return {"weights": weights, "optimizer": None}
        (optimizer,) = self.trainer.optimizers
        state = apply_to_collection(optimizer.state_dict(), Tensor, lambda x: x.detach().to("cpu", copy=True))
        return {"weights": weights, "optimizer": state}

    @torch.no_grad()
    def _restore(self, second: int) -> None:
        """Go back to where the trial began, when it is over."""
        if not second or self._start is None:
            return
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(self._start["weights"][name])
        if self._trainer is not None:
            self.trainer.optimizers[0].load_state_dict(self._start["optimizer"])
        self._start = None

    # ---- the schedule, in pairs of steps --------------------------------------------------------------------------

    def lr_scheduler_step(self, scheduler: LRSchedulerTypeUnion, metric: Any | None) -> None:
        """After the step itself, not after the trial: both have the same learning rate."""
        if self._start is None:
            super().lr_scheduler_step(scheduler, metric)

    def _remaining(self, step: int) -> float:
        return super()._remaining(2 * step)

    # ---- checkpoints --------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add, after a trial, where it began."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["grade_lightning"]["start"] = self._start

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Resume after a trial with the step itself."""
        super().on_load_checkpoint(checkpoint)
        self._start = checkpoint["grade_lightning"].get("start")


def _parts(seen: Experience, size: int, steps: int) -> tuple[Tensor, ...]:
    """Rows of each micro-batch: whole prompts."""
    prompts = len(seen.rollout.ids) // size
    if prompts % steps:
        raise InputError(f"{prompts} prompts cannot be divided evenly into {steps} parts; change data.batch_size")
    return torch.arange(len(seen.rollout.ids)).chunk(steps)
