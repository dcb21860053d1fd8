"""`grade-fit --preflight`: the run is set up, measured, and never trained."""

from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary, ProgressBar
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers.logger import DummyLogger

from grade_lightning.callbacks import Export
from grade_lightning.data import TextDataModule
from grade_lightning.errors import InputError
from grade_lightning.strategies import FSDP2

from .measure import Done, _Measure


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
    except Done:
        pass
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"preflight: out of memory with {measure.doing}; take a smaller model, LoRA or shorter texts"
        ) from error
    else:
        raise InputError("preflight: the run ends before its first step; raise --trainer.max_steps")
    if measure.too_large is not None:
        raise InputError(measure.too_large)
