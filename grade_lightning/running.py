"""A Trainer as the command line makes it."""

from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, ProgressBar

from grade_lightning.callbacks import Checkpoint, Completions, Export, Progress, Requeue, Terminate

SETTINGS: dict[str, Any] = {"num_sanity_val_steps": 0, "log_every_n_steps": 5, "gradient_clip_val": 1.0}
"""Lightning's defaults are others: it clips nothing, and measures before it trains."""


def usual_precision(accelerator: str = "auto") -> Any:
    """`bf16-mixed` on a GPU that has it; None, which is float32, elsewhere."""
    on_cuda = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return "bf16-mixed" if on_cuda and torch.cuda.is_bf16_supported() else None


def make_trainer(**kwargs: Any) -> Trainer:
    """Lightning's Trainer with the settings and callbacks of `grade-fit`.

    Gradients are clipped to norm 1, checkpoints can be resumed exactly and are never half written, completions are
    logged, the trained model is exported, and a cluster's signals end the run in order. What is given takes the place
    of its like: your own `ModelCheckpoint` that of ours, an `Export` with another folder that of the usual one.

    Args:
        **kwargs: those of `lightning.pytorch.Trainer`.

    Example:
        >>> trainer = make_trainer(max_steps=20, accelerator="cpu", logger=False)
        >>> trainer.gradient_clip_val, trainer.max_steps
        (1.0, 20)
    """
    given = kwargs.pop("callbacks", None) or []
    callbacks: list[Callback] = list(given) if isinstance(given, list | tuple) else [given]
    usual: list[tuple[type[Callback], type[Callback]]] = [
        (Completions, Completions),
        (Export, Export),
        (Requeue, Requeue),
        (Terminate, Terminate),
    ]
    if kwargs.get("enable_checkpointing", True) is not False:
        usual.append((Checkpoint, ModelCheckpoint))
    if kwargs.get("enable_progress_bar", True) is not False:
        usual.append((Progress, ProgressBar))
    callbacks += [make() for make, like in usual if not any(isinstance(callback, like) for callback in callbacks)]
    precision = {"precision": usual_precision(kwargs.get("accelerator", "auto"))}
    return Trainer(**SETTINGS | precision | kwargs, callbacks=callbacks)
