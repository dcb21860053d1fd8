"""What a command does once trainer, model and data are made: train, or measure, and say what came of it."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.utilities import rank_zero_info

from grade_lightning.allocator import keep_freed_memory
from grade_lightning.callbacks import Export, PredictionWriter
from grade_lightning.files import write_atomically
from grade_lightning.modules import AlignmentModule

from .config import GradeCLI
from .guard import all_end_together, remove_unstarted_run
from .resume import latest


def train(cli: GradeCLI) -> None:
    """Measure, train, measure again."""
    _settle_memory(cli)
    trainer, model, data = cli.trainer, cli.model, cli.datamodule
    measures = trainer.limit_val_batches != 0 and not trainer.fast_dev_run  # type: ignore[attr-defined]
    with remove_unstarted_run(trainer, cli.start.step), all_end_together(trainer):
        if measures and cli.start.checkpoint is None:
            trainer.validate(model, data, verbose=False)
        trainer.fit(model, data, ckpt_path=cli.start.checkpoint, weights_only=True)
        if measures and cli.summary.last_step != trainer.global_step:
            _settle_counters(trainer.fit_loop, trained=trainer.global_step != cli.start.step)
            trainer.validate(model, data, verbose=False)


def _settle_memory(cli: GradeCLI) -> None:
    """On a processor the C library keeps freed memory for the next tensors; a GPU's tensors are none of its."""
    if isinstance(cli.trainer.accelerator, CPUAccelerator):
        keep_freed_memory()


def _settle_counters(loop: _FitLoop, trained: bool) -> None:
    """Have a measurement after the training logged at the step and in the epoch in which the training ended.

    Lightning counts an epoch that `max_steps` cut short as a whole one, and where a checkpoint left nothing to train it
    is a step short, and an epoch that had just ended.
    """
    loop.epoch_loop._batches_that_stepped = loop.epoch_loop.global_step
    epoch, ended = loop.epoch_progress.current, loop.epoch_loop.batch_progress.is_last_batch
    if trained:
        epoch.completed -= not ended
    elif ended:
        epoch.completed = epoch.ready


def print_summary(cli: GradeCLI, seconds: float) -> None:
    """The table of what the training changed, and where everything lies."""
    trainer = cli.trainer
    log_dir = trainer.log_dir  # asks all processes
    where = {"time": f"{seconds:.0f} s"}
    if trainer.logger is not None and log_dir:
        where["logs"] = f"{log_dir} (tensorboard --logdir {Path(log_dir).parent.parent})"
    export = next(callback for callback in trainer.callbacks if isinstance(callback, Export))  # type: ignore[attr-defined]
    folder = export.path(trainer)
    if folder is not None and folder.is_dir():
        where["model"] = str(folder)
    if trainer.is_global_zero:
        cli.summary.print(where)


def measure(cli: GradeCLI) -> None:
    """Validate, test or predict, and say what was written."""
    _settle_memory(cli)
    entry = getattr(cli.trainer, cli.command)
    kwargs = {"return_predictions": False} if cli.command == "predict" else {}
    folder = _run_to_test(cli) if cli.command == "test" else None
    if folder is not None and cli.trainer.world_size == 1:  # of several processes each has a part of the lines
        lines = folder / "test.jsonl"
        if not cli.config.output or Path(cli.config.output).resolve() != lines.resolve():
            cli.trainer.callbacks.append(PredictionWriter(str(lines)))  # type: ignore[attr-defined]
    with remove_unstarted_run(cli.trainer), all_end_together(cli.trainer):
        found = entry(cli.model, datamodule=cli.datamodule, ckpt_path=cli.start.checkpoint, weights_only=True, **kwargs)
    if folder is not None and cli.trainer.is_global_zero:
        print(f"written: {write_test(found[0], folder)}")
    if cli.command == "predict" and cli.trainer.is_global_zero:
        writer = next(c for c in cli.trainer.callbacks if isinstance(c, PredictionWriter))  # type: ignore[attr-defined]
        print(f"written: {writer.path}")


def _run_to_test(cli: GradeCLI) -> Path | None:
    """The folder of the run whose last checkpoint is measured, unless it has a test or cannot be written to."""
    checkpoint = cli.start.checkpoint
    if checkpoint is None or not isinstance(cli.model, AlignmentModule) or cli.trainer.fast_dev_run:  # type: ignore[attr-defined]
        return None
    folder = checkpoint.parent.parent
    if not (folder / "config.yaml").is_file() or latest(folder) != checkpoint or not os.access(folder, os.W_OK):
        return None
    for path in (folder / "test.json", folder / "test.jsonl"):
        if path.exists():
            rank_zero_info(f"{path}: exists and is kept; remove it to write this test")
            return None
    return folder


def write_test(metrics: Mapping[str, float], folder: Path) -> Path:
    """What `trainer.test` found, as `test.json` in the run's folder: all of it or nothing.

    Args:
        metrics: `test/reward` and so on.
        folder: the run's; `test.jsonl` beside it has the lines of a `PredictionWriter`.
    """
    found = {name.removeprefix("test/"): value for name, value in metrics.items()}
    return write_atomically(folder / "test.json", json.dumps(found, indent=1))
