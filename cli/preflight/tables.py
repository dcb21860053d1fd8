"""What is printed of a preflight: settings, parameters, memory and a few texts."""

from importlib.util import find_spec
from typing import Any

import torch
from lightning.pytorch import Trainer
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from grade_lightning.data import TextDataModule
from grade_lightning.modules import AlignmentModule, TrainableModule
from grade_lightning.policies.endings import end_of_turn
from grade_lightning.rollouts import TransformersEngine

from . import inventory
from .memory import PHASES, Memory

USED = 0.9
"""The part of the memory that tensors are planned to take."""
SHOWN = 4
"""Sequences that are shown."""


BEGINNING = 5
"""Tokens that are shown of how a prompt begins."""


def settings(trainer: Trainer, module: TrainableModule, data: TextDataModule, batch: dict[str, Any]) -> Table:
    """Method, device, precision, special tokens, and how the batch's first prompt or text begins."""
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
        "longest": ", ".join(f"{name} {length} tokens" for name, length in inventory.lengths(module, data).items()),
        "pad token": tokens(tokenizer.pad_token_id),
        "eos token": tokens(tokenizer.eos_token_id),
        "bos token": tokens(tokenizer.bos_token_id),
        "end of turn": tokens(end_of_turn(tokenizer)),
    }
    first = batch["input_ids"][0][batch["attention_mask"][0].bool()].tolist()
    kind = "text" if module.batching.view in ("text", "labelled", "preferences") else "prompt"
    rows[f"a {kind} begins with"] = tokens(first[:BEGINNING])
    if isinstance(module, AlignmentModule):
        rows["reward"] = f"{type(module.reward).__name__}: {module.reward.name}"
        rows["engine"] = _engine(module)
        rows["a completion ends with"] = tokens(module.eos_ids)
        rows["padding"] = "prompts on the left, completions on the right"
    else:
        rows["a text ends with"] = tokens(module.eos_ids)
        rows["padding"] = "texts on the right"
    table = Table("", "", title="Preflight", show_header=False)
    for row in rows.items():
        table.add_row(*map(escape, row))
    return table


def _engine(module: AlignmentModule) -> str:
    engine = module.sampler.engine
    other = isinstance(engine, TransformersEngine) and find_spec("vllm") is not None
    hint = "; vLLM is installed and may be faster: --model.sampler.engine VLLMEngine" if other else ""
    return f"{type(engine).__name__}{hint}"


def counts(parts: dict[str, list[Tensor]]) -> Table:
    """Parameters of each part, trained and frozen."""
    table = Table("", title="Parameters")
    table.add_column("trained", justify="right")
    table.add_column("frozen", justify="right")
    for name, tensors in parts.items():
        trained = sum(x.numel() for x in tensors if x.requires_grad)
        table.add_row(name, f"{trained:,}", f"{sum(x.numel() for x in tensors) - trained:,}")
    return table


def needs(memory: Memory, size: int, cache: int, room: int | None, largest: int | None) -> Table:
    """Memory by parts and phases, at the batch size that was given and for any other."""
    table = Table("", title=f"Memory of each process, with data.batch_size {size}")
    table.add_column("bytes", justify="right")
    table.add_column("with a batch of n")
    for part, amount in memory.parts.items():
        table.add_row(part, readable_size(amount))
    for phase, line in sorted(memory.phases.items(), key=lambda item: list(PHASES).index(item[0])):
        table.add_row(
            PHASES[phase], readable_size(line(size)), f"{readable_size(line.fixed)} + n × {readable_size(line.slope)}"
        )
        if phase == "sampling" and cache:
            table.add_row("  of it keys and values", readable_size(cache))
    table.add_row("in all, with the largest of the phases", readable_size(memory.total(size)), end_section=True)
    table.add_row("there are", "unknown" if room is None else readable_size(room))
    if largest is not None:
        table.add_row("largest data.batch_size", str(largest), f"with {USED:.0%} of the memory")
    return table


def texts(module: TrainableModule, batch: dict[str, Any]) -> Table:
    """What is trained on at first: sampled and scored by the policy as it is, or read."""
    if isinstance(module, AlignmentModule):
        found = module.collect(batch)
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
        if "loss_mask" in batch:
            columns["learned"] = [str(count) for count in batch["loss_mask"].sum(-1).tolist()]
        if "labels" in batch:
            columns["label"] = [str(label) for label in batch["labels"].tolist()]
    table = Table(*columns, title="A batch", show_lines=True)
    for row in list(zip(*columns.values(), strict=True))[:SHOWN]:
        table.add_row(*(escape(cell.strip()) for cell in row))
    return table


def readable_size(amount: float) -> str:
    """A number of bytes for people.

    Example:
        >>> readable_size(0), readable_size(2_540_000), readable_size(3e10)
        ('0.0 kB', '2.5 MB', '30.0 GB')
    """
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if abs(amount) >= factor:
            return f"{amount / factor:,.1f} {unit}"
    return f"{amount / 1e3:.1f} kB"
