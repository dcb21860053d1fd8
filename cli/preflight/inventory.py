"""What there is before anything is measured: tensors, free memory, the lengths of texts."""

from contextlib import suppress
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from transformers import PreTrainedModel

from grade_lightning.data import TextDataModule
from grade_lightning.errors import InputError
from grade_lightning.modules import AlignmentModule, TrainableModule
from grade_lightning.policies import Policy

from .memory import storage_bytes


def tensors_by_part(module: TrainableModule) -> dict[str, list[Tensor]]:
    """Parameters and buffers of policy, reference, value head, reward, judges or whatever else there is."""
    found: dict[str, list[Tensor]] = {}
    for name, child in module.named_children():
        parts = {name: child.model, "reference": child.reference} if isinstance(child, Policy) else {name: child}
        for name, part in parts.items():
            tensors = [] if part is None else [*part.parameters(), *part.buffers()]
            if tensors:
                found[name.replace("_", " ")] = tensors
    return found


def room(trainer: Trainer, module: TrainableModule) -> int | None:
    """Bytes that this process can have, with those that it has; None where they are not known."""
    device = module.device
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines() if device.type == "cpu" else []:
            if line.startswith("MemAvailable"):
                free = int(line.split()[1]) * 1024
                return free // trainer.num_devices + sum(storage_bytes(x) for x in tensors_by_part(module).values())
    return None


def lengths(module: TrainableModule, data: TextDataModule) -> dict[str, int]:
    """Most tokens of a prompt (or text) and of a completion."""
    configs = (m.config for m in module.modules() if isinstance(m, PreTrainedModel))
    context = getattr(next(configs).get_text_config(), "max_position_embeddings", None) or data.max_text_tokens
    text = min(data.max_text_tokens, context)
    if not isinstance(module, AlignmentModule):
        return {"input": text, "completion": text}
    sampled = module.batching.view == "prompts"
    return {"input": data.max_prompt_tokens, "completion": module.sampler.max_new_tokens if sampled else text}


def smallest_batch(module: TrainableModule, size: int) -> int:
    """The smallest batch size that the method takes."""
    for unit in range(1, size):
        with suppress(InputError):
            module.batching.rows(unit)
            return unit
    return size
