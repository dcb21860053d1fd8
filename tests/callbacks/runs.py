"""Short runs, and functions that judge them."""

import math
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from grade_lightning.methods import GradeSTE
from grade_lightning.policies import Policy
from grade_lightning.rewards import FunctionReward
from grade_lightning.rollouts import Sampler
from tests.conftest import make_model, make_prompts, make_tokenizer


def trainer(folder: Path, *callbacks: Any, **kwargs: Any) -> Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "max_steps": 2,
        "default_root_dir": folder,
    }
    return Trainer(callbacks=list(callbacks), **quiet | kwargs)


class Lengths(GradeSTE):
    """Judged by a function; never trained here."""

    backpropagates_reward = False


def judged_by(function: Any) -> Lengths:
    policy = Policy.from_model(make_model("gpt2"), make_tokenizer())
    return Lengths(policy, FunctionReward(function), sampler=Sampler(max_new_tokens=4))


def rows(count: int = 2) -> DataLoader[Any]:
    return DataLoader([make_prompts() | {"columns": {}}] * count, batch_size=None)  # type: ignore[arg-type]


def ones(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    return [1.0 for _ in completions]


def nothing(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    return [None for _ in completions]


def infinite(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    return [math.inf for _ in completions]


class Saves(LightningModule):
    """Trains one number."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return cast(torch.Tensor, self.layer(torch.ones(1)).sum())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def plain() -> DataLoader[Any]:
    return DataLoader([torch.ones(1)] * 2, batch_size=None)  # type: ignore[arg-type]
