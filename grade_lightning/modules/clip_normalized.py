"""Gradients that are normalised by what the clip leaves out."""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from grade_lightning.errors import InputError
from grade_lightning.gates import complement
from grade_lightning.strategies import FSDP2
from grade_lightning.terms import PolicyLoss

from .policy_gradient import PolicyGradientModule


class ClipNormalizedModule(PolicyGradientModule):
    """A policy gradient whose step is divided by max(1, x), x the size of what its gate cuts off.

    With C the gradient of the line whose gate is the complement, line + C is the gradient without a clip. C is taken in
    each training step, by one more backward pass, and added up over micro-batches and processes.

    Args:
        normalizer: x: |C| / |g|, g the gradient of the whole loss, by which no scale of the loss matters (`relative`);
            or |C| itself (`absolute`).
        **kwargs: those of :class:`PolicyGradientModule`.
    """

    def __init__(self, normalizer: Literal["relative", "absolute"] = "relative", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.normalizer = normalizer
        line = self.terms[0]
        assert isinstance(line, PolicyLoss)
        self.cut = PolicyLoss(complement(line.gate), line.aggregate, line.level, clips=False)
        self._cut_off: dict[nn.Parameter, Tensor] = {}

    def setup(self, stage: str) -> None:
        """Check the strategy."""
        super().setup(stage)
        if isinstance(self.trainer.strategy, FSDP2):
            raise InputError(
                f"--trainer.strategy: {type(self).__name__} takes a second gradient of the same pass, for which fsdp2 "
                "has no whole weights; use ddp"
            )

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The loss; the gradient of what was cut off is taken here."""
        loss = super().training_step(batch, batch_idx)
        trained = [p for p in self.parameters() if p.requires_grad]
        cut = self._clipped / self.accumulation()
        gradients = torch.autograd.grad(cut, trained, retain_graph=True, allow_unused=True)
        for parameter, gradient in zip(trained, gradients, strict=True):
            if gradient is not None:
                before = self._cut_off.get(parameter)
                self._cut_off[parameter] = gradient if before is None else before + gradient
        del self._clipped
        return loss

    def add_terms(self, seen: Any, now: Any) -> Any:
        """The terms of the loss; what is cut off stands beside them."""
        self._clipped, _ = self.cut(seen, now, self.reduce)
        return super().add_terms(seen, now)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Divide the gradient; one that is not finite is then left out as ever."""
        cut_off, self._cut_off = [self.reduce.mean(x) for x in self._cut_off.values()], {}
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        size = nn.utils.get_total_norm(cut_off)
        if self.normalizer == "relative":
            size = size / nn.utils.get_total_norm(gradients).clamp(min=torch.finfo(size.dtype).tiny)
        torch._foreach_div_(gradients, size.clamp(min=1))
        self.log("train/clip_bias", size)
        super().on_before_optimizer_step(optimizer)
