"""Differentially private steps on pairs of completions."""

import math
import os
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from grade_lightning.distributed import Reduce
from grade_lightning.errors import InputError, check_range
from grade_lightning.functional.privacy import clip_factor, gaussian
from grade_lightning.modules import PreferenceModule
from grade_lightning.numerics import hash_seed
from grade_lightning.records import batch_rows


class PrivatePairs(Callback):
    """Clip the gradient of each pair to a norm of C, sum them, and add noise of standard deviation `multiplier` · C.

    A micro-batch is one pair (`--data.batch_size 2`), a step has `--trainer.accumulate_grad_batches` of them on each
    process. What is protected is whether a pair was in the data. Logged: `privacy/clipped`, the share of pairs whose
    gradient was cut, and, with `delta` (the extra `private`), `privacy/epsilon`: what is spent by the accountant of
    opacus, as if each step had drawn its pairs independently.

    Args:
        clip: C; infinite only without noise.
        multiplier: of the noise, in C.
        delta: δ of the (ε, δ) that is logged; below one over the number of pairs.

    References:
        | Deep Learning with Differential Privacy (Abadi et al., 2016), https://arxiv.org/abs/1607.00133

    Example:
        >>> PrivatePairs(clip=0.5, multiplier=1.0).clip
        0.5
    """

    def __init__(self, clip: float = 1.0, multiplier: float = 1.0, delta: float | None = None) -> None:
        check_range("(0, inf]", "PrivatePairs", clip=clip)
        check_range("[0, inf)", "PrivatePairs", multiplier=multiplier)
        check_range("(0, 1)", "PrivatePairs", delta=delta)
        if math.isinf(clip) and multiplier:
            raise InputError("PrivatePairs.clip = inf: the noise would be infinite; give a bound, or multiplier 0")
        self.clip, self.multiplier, self.delta = clip, multiplier, delta
        self.steps = 0
        """That were taken so far."""
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._factors: list[Tensor] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that each loss is of one pair, and leave the averaging of processes to the step.

        Raises:
            InputError: it is not, the gradients are nowhere whole, or opacus is missing.
        """
        name = type(pl_module).__name__
        if not isinstance(pl_module, PreferenceModule) or pl_module.pairs != "data":
            raise InputError(
                f"PrivatePairs: {name} here has losses that rows share, so no gradient is of one row alone; use DPO or "
                "IPO with --model.pairs data, or leave the callback out"
            )
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            raise InputError("PrivatePairs: clips gradients, which --trainer.precision 16-mixed scales; use bf16-mixed")
        if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise InputError(
                f"PrivatePairs: clips whole gradients, which {type(trainer.strategy).__name__} does not have; use ddp"
            )
        if isinstance(model := trainer.strategy.model, DistributedDataParallel):
            model.require_backward_grad_sync = False  # they are clipped before they are added up
        if self.delta is not None:
            _accountant()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Check that it is one pair.

        Raises:
            InputError: it is not.
        """
        if batch_rows(batch) != 1:
            raise InputError(
                f"PrivatePairs: a micro-batch has {batch_rows(batch)} pairs, and must have one; set "
                "--data.batch_size 2, and the pairs of a step by --trainer.accumulate_grad_batches"
            )

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Clip the gradient of a pair and put it by."""
        parameters = [p for p in pl_module.parameters() if p.grad is not None]
        gradients = [p.grad for p in parameters if p.grad is not None]
        factor = clip_factor(gradients, self.clip / trainer.accumulate_grad_batches)  # losses are divided by that
        self._factors.append(factor)
        for p, gradient in zip(parameters, gradients, strict=True):
            clipped = gradient.mul_(factor)
            self._sums[p] = self._sums[p] + clipped if p in self._sums else clipped
            p.grad = None

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Give the optimizer the noisy mean over all pairs of the step."""
        reduce, self.steps = Reduce(trainer), self.steps + 1
        pairs = trainer.accumulate_grad_batches * trainer.world_size
        key = int(os.environ.get("PL_GLOBAL_SEED", "0")), "privacy", trainer.global_step
        for index, (p, total) in enumerate(self._sums.items()):
            noise = (
                gaussian(total, self.multiplier * self.clip / pairs, hash_seed(*key, index)) if self.multiplier else 0
            )
            p.grad = reduce.mean(total) + noise  # the same noise on all processes
        cut = torch.stack(self._factors)
        pl_module.log("privacy/clipped", reduce.mean((cut < 1).float().mean()))
        if self.delta is not None and trainer._logger_connector.should_update_logs:
            pl_module.log(
                "privacy/epsilon", self.epsilon(trainer.accumulate_grad_batches / trainer.num_training_batches)
            )
        self._sums, self._factors = {}, []

    def epsilon(self, rate: float) -> float:
        """ε of the steps so far, at `delta`.

        Args:
            rate: pairs of a step over those of the data.
        """
        if not self.multiplier:
            return math.inf
        accountant = _accountant()()
        accountant.history = [(self.multiplier, min(1.0, rate), self.steps)]
        return float(accountant.get_epsilon(self.delta))

    def state_dict(self) -> dict[str, Any]:
        """How many steps were taken."""
        return {"steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it."""
        self.steps = state_dict["steps"]


def _accountant() -> Any:
    try:
        from opacus.accountants import RDPAccountant
    except ModuleNotFoundError as error:
        if error.name != "opacus":
            raise
        raise InputError("PrivatePairs.delta needs opacus: pip install 'grade-lightning[private]'") from error
    return RDPAccountant
