"""`grade-fit --preflight`: what a run is going to do and to need, found out by small steps of it.

The run is set up as ever, with all that it refuses, up to its first batch. Then a few completions are sampled, scored
and shown, and the memory is measured: whole steps (sampling, reward, loss, backward pass, optimizer) with few
sequences, each as long as the settings allow. What is alive at the same time is counted tensor by tensor; with each
sequence it grows by the same amount, so

    bytes(batch_size) = weights + gradients + optimizer state + max over phases p of (fixed_p + slope_p · batch_size)

over the phases of a step: sampling, scoring, the passes of policy and reference, the pass over the vocabulary and so
on. Not counted is what kernels use inside, what an allocator keeps in pieces, and the runtime itself; a tenth of the
memory is kept free for them.
"""

import math
import weakref
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary, ProgressBar
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import DDPStrategy
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from grade_lightning.callbacks import Export
from grade_lightning.data import TextDataModule
from grade_lightning.errors import InputError
from grade_lightning.functional.vocabulary import ELEMENTS
from grade_lightning.module import AlignmentModule, TrainableModule
from grade_lightning.policies import Policy
from grade_lightning.rows import slice_rows
from grade_lightning.strategies import FSDP2

USED = 0.9
"""The part of the memory that tensors are planned to take."""
SHOWN = 4
"""Sequences that are shown."""
PHASES = {
    "sampling": "sampling",
    "reward": "scoring",
    "policy": "policy's pass",
    "reference": "reference's pass",
    "vocabulary": "pass over the vocabulary",
    "hops": "hops",
    "loss": "rest of the loss",
    "backward": "backward pass",
    "optimizer": "optimizer step",
}
"""Phases of a step, most of them by the names that a profiler sees, and what they are called in the table."""


def preflight(trainer: Trainer, model: LightningModule, data: TextDataModule, ckpt_path: Path | None) -> None:
    """Set up the run, measure it and print what was found. Nothing is written, no training is kept.

    Raises:
        InputError: the run cannot work, or its batch is not going to fit into the memory.
    """
    if isinstance(trainer.strategy, FSDP2):
        raise InputError(
            "preflight: under fsdp2 nothing is measured; leave --trainer.strategy and --trainer.devices out, and "
            "divide weights, gradients and optimizer state by the processes (a step has one whole copy of the weights)"
        )
    measure = _Measure(data)
    quiet = (ProgressBar, ModelSummary, SaveConfigCallback, Export)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Export):  # while there is the logger, by which it finds its folder
            callback.setup(trainer, model, "fit")
            callback.on_train_start(trainer, model)
    trainer.callbacks = [measure, *(c for c in trainer.callbacks if not isinstance(c, quiet))]  # type: ignore[attr-defined]
    trainer.logger = DummyLogger()
    try:
        trainer.fit(model, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    except _Done:
        pass
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"preflight: out of memory with {measure.doing}; take a smaller model, LoRA or shorter texts"
        ) from error
    else:
        raise InputError("preflight: the run ends before its first step; raise --trainer.max_steps")
    if measure.too_large is not None:
        raise InputError(measure.too_large)


class _Done(Exception):  # noqa: N818
    """All is measured."""


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of the tensors that are made under it and are alive at the same time.

    Views count once, and tensors that were there before do not count.

    Example:
        >>> with LiveTensors() as live:
        ...     kept = torch.zeros(3) + torch.zeros(3)
        >>> live.now, live.peaks
        (12, Counter({'loss': 36}))
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.phase = "loss"
        """Of all that is in none of the phases that have a name for the profiler."""
        self.peaks: Counter[str] = Counter()
        """Most bytes that were alive in each phase."""
        self._known: set[int] = set()
        self._entered: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.profiler._record_function_enter_new.default:  # the phases that a profiler sees
            self._entered.append(args[0])
        elif func is torch.ops.profiler._record_function_exit._RecordFunction and self._entered:
            self._entered.pop()
        self._see((args, kwargs), new=False)
        result = func(*args, **kwargs or {})
        self._see(result, new=True)
        return result

    def _see(self, values: Any, new: bool) -> None:
        for tensor in tree_leaves(values):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self._known:
                size = storage.nbytes() if new else 0
                self._known.add(storage._cdata)
                weakref.finalize(storage, self._forget, storage._cdata, size)
                self.now += size
                phase = next((name for name in reversed(self._entered) if name in PHASES), self.phase)
                self.peaks[phase] = max(self.peaks[phase], self.now)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@dataclass(frozen=True)
class Line:
    """Bytes that a phase needs at a batch size."""

    fixed: float
    slope: float

    @classmethod
    def through(cls, one: tuple[int, int], two: tuple[int, int]) -> "Line":
        """The line through two measurements, each a batch size and bytes.

        Example:
            >>> Line.through((2, 50), (4, 90))
            Line(fixed=10.0, slope=20.0)
        """
        slope = max(0.0, (two[1] - one[1]) / (two[0] - one[0]))
        return cls(two[1] - slope * two[0], slope)

    def __call__(self, size: int) -> float:
        """Bytes at this batch size."""
        return max(0.0, self.fixed + self.slope * size)

    def largest(self, room: float) -> float:
        """The batch size that needs so many bytes.

        Example:
            >>> Line(10, 20).largest(100), Line(10, 0).largest(100), Line(10, 0).largest(5)
            (4.5, inf, -inf)
        """
        left = room - self.fixed
        return left / self.slope if self.slope else math.copysign(math.inf, left)


@dataclass
class Memory:
    """What a run needs, in bytes."""

    parts: dict[str, int]
    """Whatever the batch."""
    phases: dict[str, Line]
    """Beside that, in each phase of a step."""
    unit: int
    """Batch sizes are multiples of this."""

    def total(self, size: int) -> float:
        """At a batch size."""
        return sum(self.parts.values()) + max(line(size) for line in self.phases.values())

    def largest(self, room: float) -> int:
        """The largest batch size for which so many bytes are enough; 0 if there is none.

        Example:
            >>> Memory({"weights": 100}, {"training": Line(10, 20), "reward": Line(0, 1)}, unit=4).largest(300)
            8
        """
        left = room - sum(self.parts.values())
        size = min(line.largest(left) for line in self.phases.values())
        return int(min(max(size, 0), 2**20) // self.unit * self.unit)


class _Measure(Callback):
    """At the first batch, when all else has been set up and checked: look, measure, print, and end the run."""

    def __init__(self, data: TextDataModule) -> None:
        self.data = data
        self.doing = "the models alone"
        self.too_large: str | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not isinstance(pl_module, TrainableModule):
            raise InputError(f"preflight: {type(pl_module).__name__} is no TrainableModule of grade_lightning")
        trainer.callbacks = [self]  # type: ignore[attr-defined]  # the others are for a real run
        size, unit = self.data.batch_size, _unit(pl_module, self.data.batch_size)
        parts, room = _parts(pl_module), _room(trainer, pl_module)
        settings = _settings(trainer, pl_module, self.data)
        with trainer.precision_plugin.train_step_context():
            texts = _texts(pl_module, slice_rows(batch, 0, pl_module.rows_per_batch(max(unit, SHOWN // unit * unit))))
            cache = _cache(pl_module, self.data)
        memory = self._memory(trainer, pl_module, batch, unit)
        memory.parts = {name: _bytes(tensors) for name, tensors in parts.items()} | memory.parts
        largest = None if room is None else memory.largest(USED * room)
        if largest is not None and largest < size:
            remedy = f"lower it to {largest}" if largest else "take a smaller model, LoRA or shorter texts"
            self.too_large = (
                f"data.batch_size: {size} needs about {_size(memory.total(size))} of memory, and there are "
                f"{_size(USED * (room or 0))} for it; {remedy}"
            )
        if trainer.is_global_zero:
            console = Console()
            console.print(settings)
            console.print(_counts(parts))
            cache *= size * pl_module.visits // getattr(pl_module, "epochs", 1)
            console.print(_needs(memory, size, cache, room, largest))
            console.print(texts)
        raise _Done

    def _memory(self, trainer: Trainer, module: TrainableModule, batch: Any, unit: int) -> Memory:
        """From steps of two sizes, both as small as they can be with a whole chunk of the vocabulary."""
        (optimizer,), whole = trainer.optimizers, 1
        lengths, size = _lengths(module, self.data), self.data.batch_size
        if isinstance(policy := getattr(module, "policy", None), Policy):
            vocabulary = policy.base.get_output_embeddings().weight.shape[0]
            chunk = ELEMENTS.get(module.device.type, ELEMENTS["cuda"]) / vocabulary
            whole = math.ceil(chunk / lengths["completion"] / unit)
            policy.base.generation_config.eos_token_id = []  # no completion ends early
        few = max(1, min(whole, size // unit // 2)) * unit
        found = []
        for count in (unit, unit, few, 2 * few):  # the first two make what stays: optimizer state, buckets
            self.doing = f"a batch_size of {count}"
            found.append(_step(trainer, module, _longest(batch, module.rows_per_batch(count), lengths)))
        one, two = found[-2:]
        gradients = _bytes([p.grad for p in module.parameters() if p.grad is not None])
        phases = {
            name: Line.through((few, one.peaks.get(name, peak) - gradients), (2 * few, peak - gradients))
            for name, peak in two.peaks.items()
        }
        state = [x for x in tree_leaves(list(optimizer.state.values())) if isinstance(x, Tensor)]
        parts = {"gradients": gradients, "optimizer state": _bytes(state)}
        if isinstance(trainer.strategy, DDPStrategy):
            parts["buckets of gradients"] = gradients
        return Memory(parts, phases, unit)


def _step(trainer: Trainer, module: TrainableModule, batch: dict[str, Any]) -> LiveTensors:
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


# ---- what there is --------------------------------------------------------------------------------------------------


def _parts(module: TrainableModule) -> dict[str, list[Tensor]]:
    """Parameters and buffers of policy, reference, value head, reward, judges or whatever else there is."""
    found: dict[str, list[Tensor]] = {}
    for name, child in module.named_children():
        parts = {name: child.model, "reference": child.reference} if isinstance(child, Policy) else {name: child}
        for name, part in parts.items():
            tensors = [] if part is None else [*part.parameters(), *part.buffers()]
            if tensors:
                found[name.replace("_", " ")] = tensors
    return found


def _bytes(tensors: list[Tensor]) -> int:
    return sum({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}.values())


def _unit(module: TrainableModule, size: int) -> int:
    """The smallest batch size that the method takes."""
    for unit in range(1, size):
        with suppress(InputError):
            module.rows_per_batch(unit)
            return unit
    return size


def _room(trainer: Trainer, module: TrainableModule) -> int | None:
    """Bytes that this process can have, with those that it has; None where they are not known."""
    device = module.device
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines() if device.type == "cpu" else []:
            if line.startswith("MemAvailable"):
                free = int(line.split()[1]) * 1024
                return free // trainer.num_devices + sum(_bytes(x) for x in _parts(module).values())
    return None


def _lengths(module: TrainableModule, data: TextDataModule) -> dict[str, int]:
    """Most tokens of a prompt (or text) and of a completion."""
    configs = (m.config for m in module.modules() if isinstance(m, PreTrainedModel))
    context = getattr(next(configs).get_text_config(), "max_position_embeddings", None) or data.max_text_tokens
    text = min(data.max_text_tokens, context)
    if not isinstance(module, AlignmentModule):
        return {"input": text, "completion": text}
    sampled = module.view == "prompts"
    return {"input": data.max_prompt_tokens, "completion": module.sampler.max_new_tokens if sampled else text}


def _longest(batch: dict[str, Any], count: int, lengths: dict[str, int]) -> dict[str, Any]:
    """So many rows, made of those that are there, without padding and as long as can be."""

    def rows(values: Any) -> Any:
        return [values[i % len(values)] for i in range(count)]

    made: dict[str, Any] = {}
    for name, values in batch.items():
        if isinstance(values, Tensor):
            made[name] = torch.stack(rows(values))
            if values.dim() == 2:
                length = lengths["completion" if name.startswith(("chosen", "rejected")) else "input"]
                made[name] = made[name].repeat(1, math.ceil(length / values.shape[1]))[:, :length]
                made[name] = torch.ones_like(made[name]) if name.endswith("mask") else made[name]
        else:
            made[name] = {column: rows(list(items)) for column, items in values.items()}
    return made


@torch.no_grad()
def _cache(module: TrainableModule, data: TextDataModule) -> int:
    """Bytes of the keys and values of one longest sequence; 0 where nothing is sampled, or nothing is kept."""
    if not isinstance(module, AlignmentModule) or module.view != "prompts":
        return 0
    ids = torch.zeros(1, sum(_lengths(module, data).values()), dtype=torch.long, device=module.device)
    with module.policy.evaluating() as model:
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, logits_to_keep=1)
    layers = getattr(getattr(output, module.policy.cache_name, None), "layers", [])
    return sum(_bytes([x for x in vars(layer).values() if isinstance(x, Tensor)]) for layer in layers)


# ---- what is printed ------------------------------------------------------------------------------------------------


def _settings(trainer: Trainer, module: TrainableModule, data: TextDataModule) -> Table:
    tokenizer = module.tokenizer

    def tokens(ids: Any) -> str:
        found = ids if isinstance(ids, list) else [] if ids is None else [ids]
        return ", ".join(f"{tokenizer.convert_ids_to_tokens(i)!r} ({i})" for i in found) or "none"

    device, dtypes = module.device, {str(p.dtype).removeprefix("torch.") for p in module.parameters()}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    rows = {
        "method": type(module).__name__,
        "device": f"{name}, {trainer.world_size} processes" if trainer.world_size > 1 else name,
        "strategy": type(trainer.strategy).__name__,
        "precision": f"{trainer.precision}; weights in {', '.join(sorted(dtypes))}",
        "longest": ", ".join(f"{name} {length} tokens" for name, length in _lengths(module, data).items()),
        "pad token": tokens(tokenizer.pad_token_id),
        "eos token": tokens(tokenizer.eos_token_id),
        "bos token": tokens(tokenizer.bos_token_id),
    }
    if isinstance(module, AlignmentModule):
        rows["reward"] = f"{type(module.reward).__name__}: {module.reward.name}"
        rows["a completion ends with"] = tokens(module.policy.eos_ids)
        rows["padding"] = "prompts on the left, completions on the right"
    else:
        rows["padding"] = "texts on the right"
    table = Table("", "", title="Preflight", show_header=False)
    for row in rows.items():
        table.add_row(*map(escape, row))
    return table


def _counts(parts: dict[str, list[Tensor]]) -> Table:
    table = Table("", title="Parameters")
    table.add_column("trained", justify="right")
    table.add_column("frozen", justify="right")
    for name, tensors in parts.items():
        trained = sum(x.numel() for x in tensors if x.requires_grad)
        table.add_row(name, f"{trained:,}", f"{sum(x.numel() for x in tensors) - trained:,}")
    return table


def _needs(memory: Memory, size: int, cache: int, room: int | None, largest: int | None) -> Table:
    table = Table("", title=f"Memory of each process, with data.batch_size {size}")
    table.add_column("bytes", justify="right")
    table.add_column("with a batch of n")
    for part, amount in memory.parts.items():
        table.add_row(part, _size(amount))
    for phase, line in sorted(memory.phases.items(), key=lambda item: list(PHASES).index(item[0])):
        table.add_row(PHASES[phase], _size(line(size)), f"{_size(line.fixed)} + n × {_size(line.slope)}")
        if phase == "sampling" and cache:
            table.add_row("  of it keys and values", _size(cache))
    table.add_row("in all, with the largest of the phases", _size(memory.total(size)), end_section=True)
    table.add_row("there are", "unknown" if room is None else _size(room))
    if largest is not None:
        table.add_row("largest data.batch_size", str(largest), f"with {USED:.0%} of the memory")
    return table


def _texts(module: TrainableModule, batch: dict[str, Any]) -> Table:
    """What is trained on at first: sampled and scored by the policy as it is, or read."""
    if isinstance(module, AlignmentModule):
        found = module.explore(batch)
        rollout = found.rollout
        lengths = [f"{n}" if end else f"{n}, cut off" for n, end in zip(rollout.lengths, rollout.ended, strict=True)]
        rewards = [f"{reward:.3f}" for reward in found.scores.total]
        columns = {"prompt": rollout.prompts, "completion": rollout.completions, "tokens": lengths, "reward": rewards}
    else:
        masks = batch["attention_mask"].bool()
        texts = [ids[mask] for ids, mask in zip(batch["input_ids"], masks, strict=True)]
        columns = {
            "text": module.tokenizer.batch_decode(texts, skip_special_tokens=True),
            "tokens": [str(len(ids)) for ids in texts],
        }
        if "labels" in batch:
            columns["label"] = [str(label) for label in batch["labels"].tolist()]
    table = Table(*columns, title="A batch", show_lines=True)
    for row in list(zip(*columns.values(), strict=True))[:SHOWN]:
        table.add_row(*(escape(cell.strip()) for cell in row))
    return table


def _size(amount: float) -> str:
    """A number of bytes for people.

    Example:
        >>> _size(0), _size(2_540_000), _size(3e10)
        ('0.0 kB', '2.5 MB', '30.0 GB')
    """
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if abs(amount) >= factor:
            return f"{amount / factor:,.1f} {unit}"
    return f"{amount / 1e3:.1f} kB"
