"""Toy text and labels for the stages before alignment."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from tests.conftest import VOCABULARY


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2)


def constant(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


def trainer(**kwargs: Any) -> Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "max_epochs": 1,
    }
    return Trainer(**quiet | kwargs)


def text(count: int) -> DataLoader[Any]:
    """Ascending words from a random start, padded on the right: the next word is certain, the first is not."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(count):
        ids = 2 + (torch.randint(17, (8, 1), generator=generator) + torch.arange(7)) % 17
        mask = (torch.arange(7) < torch.randint(3, 8, (8, 1), generator=generator)).long()
        rows.append({"input_ids": ids.where(mask.bool(), 1), "attention_mask": mask})
    return DataLoader(rows, batch_size=None)  # type: ignore[arg-type]


def labelled(count: int) -> DataLoader[Any]:
    """Random words; positive where w3 is among them, which it is in half of the rows."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for _ in range(count):
        ids = torch.randint(4, VOCABULARY, (16, 6), generator=generator)
        labels = torch.arange(16) % 2
        places = torch.randint(6, (16, 1), generator=generator)
        ids = torch.where(labels.bool().unsqueeze(1), ids.scatter(1, places, 3), ids)
        rows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return DataLoader(rows, batch_size=None)  # type: ignore[arg-type]


def pairs(count: int) -> DataLoader[Any]:
    """Random words of two lengths, padded on the right; w3 is among those of the preferred text alone."""
    rows = []
    for batch in labelled(count):
        ids, other = batch["input_ids"][1::2], batch["input_ids"][::2, :5]
        mask = torch.ones_like(ids)
        mask[0, 5:] = 0
        ids = ids.where(mask.bool(), 1)
        ids[0, 0] = 3
        row = {"input_ids": ids, "attention_mask": mask, "rejected_ids": other, "rejected_mask": torch.ones_like(other)}
        rows.append(row | {"margins": torch.zeros(len(ids))})
    return DataLoader(rows, batch_size=None)  # type: ignore[arg-type]


def saved_keys(run: Trainer, path: Path) -> set[str]:
    run.save_checkpoint(path)
    return set(torch.load(path, weights_only=False)["state_dict"])


def trained_keys(module: LightningModule) -> set[str]:
    return {name for name, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}
