"""Compressed gradients between processes, with saved memories of what was not sent."""

import math
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from grade_lightning.distributed import Reduce
from grade_lightning.errors import InputError, check_range
from grade_lightning.functional.error_control import Sparse, dense, largest, received, to_send

_MEMORIES = "error", "own", "all"


class EControl(Callback):
    """Send the largest components of each gradient alone, between the processes of DDP.

    Each process keeps an error e and an estimate h of its gradient, and the mean of all estimates, which is what the
    optimizer gets: three numbers for each that is trained. They are in the checkpoints. A step that is left out
    because some gradient is not finite changes none of them.

    Args:
        share: of each parameter's components that is sent, with their places.
        eta: η, how fast the error is made up for; `share` by default. 0 is EF21.

    References:
        | EControl: Fast Distributed Optimization with Compression and Error Control (Gao, Islamov, Stich, 2024),
          https://arxiv.org/abs/2311.05645

    Example:
        >>> EControl(share=0.05).eta
        0.05
    """

    def __init__(self, share: float = 0.01, eta: float | None = None) -> None:
        check_range("(0, 1]", "EControl", share=share)
        check_range("[0, 1)" if share < 1 else "[0, 1]", "EControl", eta=eta)
        self.share = share
        self.eta = share if eta is None else eta
        self.memories: dict[str, dict[str, Tensor]] = {}
        """Of each parameter `error`, `own` and `all`: e, h, and the mean of h over the processes; flat."""
        self._names: dict[int, str] = {}
        self._pending: dict[str, dict[str, Tensor]] = {}
        self._finite = True

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the place of DDP's own averaging.

        Raises:
            InputError: there is no DDP, or a scale of losses that changes.
        """
        if not isinstance(trainer.strategy, DDPStrategy):
            raise InputError(
                f"EControl: replaces DDP's averaging, but the strategy is {type(trainer.strategy).__name__}; "
                "set --trainer.strategy ddp, or leave the callback out"
            )
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            raise InputError(
                "EControl: remembers gradients, whose scale changes under --trainer.precision 16-mixed; use bf16-mixed"
            )
        self._names = {id(p): name for name, p in pl_module.named_parameters() if p.requires_grad}
        model = trainer.strategy.model
        assert isinstance(model, DistributedDataParallel)
        model.register_comm_hook(None, self._exchange)

    def _exchange(self, state: Any, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        del state
        sizes = [p.numel() for p in bucket.parameters()]
        offsets = [sum(sizes[:i]) for i in range(len(sizes))]
        gradients = bucket.buffer().split(sizes)
        memories = [self._memory(p) for p in bucket.parameters()]
        messages = [
            largest(to_send(g, own["error"], own["own"], self.eta), self.share)
            for g, own in zip(gradients, memories, strict=True)
        ]
        finite = bucket.buffer().isfinite().all().to(bucket.buffer().dtype).view(1)
        values = _gathered(torch.cat([finite, *(message.values for message in messages)]))
        places = _gathered(torch.cat([m.places + at for m, at in zip(messages, offsets, strict=True)]))
        mean = dense(Sparse(values[:, 1:].flatten(), places.flatten()), sum(sizes)) / len(values)
        self._finite &= bool(values[:, 0].all())
        sent = zip(bucket.parameters(), gradients, memories, messages, mean.split(sizes), strict=True)
        for p, gradient, own, message, received_mean in sent:
            error, after = received(gradient, own["error"], own["own"], dense(message, p.numel()))
            name = self._names[id(p)]
            self._pending[name] = {"error": error, "own": after, "all": own["all"] + received_mean}
        found = torch.cat([self._pending[self._names[id(p)]]["all"] for p in bucket.parameters()])
        device = found.device  # which a future must be told of, unless it is the processor
        future: torch.futures.Future[Tensor] = torch.futures.Future(devices=[device] if device.type != "cpu" else None)
        future.set_result(found if bool(values[:, 0].all()) else torch.full_like(found, math.nan))
        return future

    def _memory(self, parameter: Tensor) -> dict[str, Tensor]:
        name = self._names[id(parameter)]
        if name not in self.memories:
            self.memories[name] = {key: torch.zeros_like(parameter).flatten().detach() for key in _MEMORIES}
        return {key: value.to(parameter.device) for key, value in self.memories[name].items()}

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Remember what was sent, if the step is taken."""
        if self._finite:
            self.memories |= self._pending
        self._pending, self._finite = {}, True

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the memories of all processes."""
        own = {name: {key: value.cpu() for key, value in memory.items()} for name, memory in self.memories.items()}
        checkpoint["grade_lightning_econtrol"] = Reduce(trainer).gather(own)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore this process's own; with another number of processes they begin anew."""
        every = checkpoint.get("grade_lightning_econtrol", [])
        if len(every) != trainer.world_size:
            if every:
                rank_zero_warn(f"EControl: the checkpoint is of {len(every)} processes; the memories begin anew")
            return
        self.memories = every[trainer.global_rank]


def _gathered(own: Tensor) -> Tensor:
    """(processes, …)."""
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own)
    return torch.stack(parts)
