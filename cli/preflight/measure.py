"""Small steps of a run, and what they need."""

import math
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from rich.console import Console
from torch import Tensor
from torch.utils._pytree import tree_leaves

from grade_lightning.data import TextDataModule
from grade_lightning.errors import InputError
from grade_lightning.functional.vocabulary import KEPT, nothing_kept, positions_at_once
from grade_lightning.modules import AlignmentModule, TrainableModule
from grade_lightning.policies import Policy
from grade_lightning.records import slice_rows

from . import inventory, tables
from .memory import Line, LiveTensors, Memory, storage_bytes
from .remedies import remedies
from .tables import SHOWN, USED, readable_size


class _Measure(Callback):  # private, so that --help does not offer it as a callback
    """At the first batch, when all else has been set up and checked: look, measure, print, and end the run."""

    def __init__(self, data: TextDataModule) -> None:
        self.data = data
        self.doing = "the models alone"
        self.too_large: str | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Do all of it.

        Raises:
            InputError: there is nothing to measure.
            Done: all is measured.
        """
        if not isinstance(pl_module, TrainableModule):
            raise InputError(f"preflight: {type(pl_module).__name__} is not a TrainableModule of grade_lightning")
        trainer.callbacks = [self]  # type: ignore[attr-defined]  # the others are for a real run
        size, unit = self.data.batch_size, inventory.smallest_batch(pl_module, self.data.batch_size)
        parts, room = inventory.tensors_by_part(pl_module), inventory.room(trainer, pl_module)
        settings = tables.settings(trainer, pl_module, self.data, batch)
        shown = slice_rows(batch, 0, pl_module.batching.rows(max(unit, SHOWN // unit * unit)))
        with trainer.precision_plugin.train_step_context():
            texts = tables.texts(pl_module, shown)
            cache = _cache(pl_module, self.data)
        memory = self._memory(trainer, pl_module, batch, size)
        largest = None if room is None else memory.largest(USED * room)
        if room is not None and largest is not None and largest < size:
            ways = remedies(trainer, pl_module, size, USED * room, partial(self._memory, trainer, pl_module, batch))
            ways += [f"lower it to {largest}" if largest else "take a smaller model, LoRA or shorter texts"]
            self.too_large = (
                f"data.batch_size: {size} needs about {readable_size(memory.total(size))} of memory, and there are "
                f"{readable_size(USED * room)} for it; {', or '.join(ways)}"
            )
        if trainer.is_global_zero:
            console = Console()
            console.print(settings)
            console.print(tables.counts(parts))
            cache *= pl_module.batching.completions(size)
            console.print(tables.needs(memory, size, cache, room, largest))
            console.print(texts)
        raise Done

    def _memory(self, trainer: Trainer, module: TrainableModule, batch: Any, size: int) -> Memory:
        """From steps of two sizes, both as small as they can be with a whole chunk of the vocabulary."""
        (optimizer,), whole, kept = trainer.optimizers, 1, 0
        lengths, unit = inventory.lengths(module, self.data), inventory.smallest_batch(module, size)
        if isinstance(policy := getattr(module, "policy", None), Policy):
            vocabulary = policy.base.get_output_embeddings().weight.shape[0]
            chunk = positions_at_once(vocabulary, module.device.type)
            whole = math.ceil(chunk / lengths["completion"] / unit)
            policy.eos_ids = []  # no completion ends early
            logits = module.batching.completions(size) * lengths["completion"] * vocabulary
            bound = KEPT.get(module.device.type, 0)
            kept = bound if logits > bound else 0  # fewer grow with the batch, as all else does
        few = max(1, min(whole, size // unit // 2)) * unit
        found = []
        for count in (unit, unit, few, 2 * few):  # the first two make what stays: optimizer state, buckets
            self.doing = f"a batch_size of {count}"
            with nothing_kept() if kept else nullcontext():
                found.append(step(trainer, module, longest(batch, module.batching.rows(count), lengths)))
        one, two = found[-2:]
        gradients = storage_bytes([p.grad for p in module.parameters() if p.grad is not None])
        phases = {
            name: Line.through((few, one.peaks.get(name, peak) - gradients), (2 * few, peak - gradients))
            for name, peak in two.peaks.items()
        }
        state = [x for x in tree_leaves(list(optimizer.state.values())) if isinstance(x, Tensor)]
        parts = {name: storage_bytes(tensors) for name, tensors in inventory.tensors_by_part(module).items()}
        parts |= {"gradients": gradients, "optimizer state": storage_bytes(state)}
        if kept:
            parts["logits that are kept"] = 4 * kept
        if isinstance(trainer.strategy, DDPStrategy):
            parts["buckets of gradients"] = gradients
        return Memory(parts, phases, unit)


class Done(Exception):  # noqa: N818
    """All is measured."""


def step(trainer: Trainer, module: TrainableModule, batch: dict[str, Any]) -> LiveTensors:
    """A whole step, which moves no weight."""
    (optimizer,) = trainer.optimizers
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    live = LiveTensors()
    with live:
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)  # the step before has left some
        loss: Any = trainer.strategy.training_step(batch, 0)
        if trainer.accumulate_grad_batches == 1:
            optimizer.zero_grad()
        live.phase = "backward"
        trainer.strategy.backward(loss, optimizer)
        del loss
        live.phase = "optimizer"
        for parameter in module.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()
        optimizer.step(lambda: 0.0)
    return live


def longest(batch: dict[str, Any], count: int, lengths: dict[str, int]) -> dict[str, Any]:
    """So many rows, made of those that are there, without padding and as long as can be."""

    def rows(values: Any) -> Any:
        return [values[i % len(values)] for i in range(count)]

    made: dict[str, Any] = {}
    for name, values in batch.items():
        if isinstance(values, Tensor):
            made[name] = torch.stack(rows(values))
            if values.dim() == 2:
                length = lengths["completion" if name.startswith(("chosen", "rejected", "completion")) else "input"]
                made[name] = made[name].repeat(1, math.ceil(length / values.shape[1]))[:, :length]
                made[name] = torch.ones_like(made[name]) if name.endswith("mask") else made[name]
        else:
            made[name] = {column: rows(list(items)) for column, items in values.items()}
    return made


@torch.no_grad()
def _cache(module: TrainableModule, data: TextDataModule) -> int:
    """Bytes of the keys and values of one longest sequence; 0 where nothing is sampled, or nothing is kept."""
    if not isinstance(module, AlignmentModule) or module.batching.view != "prompts":
        return 0
    ids = torch.zeros(1, sum(inventory.lengths(module, data).values()), dtype=torch.long, device=module.device)
    with module.policy.evaluating() as model:
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, logits_to_keep=1)
    layers = getattr(getattr(output, module.policy.cache_name, None), "layers", [])
    return sum(storage_bytes([x for x in vars(layer).values() if isinstance(x, Tensor)]) for layer in layers)
