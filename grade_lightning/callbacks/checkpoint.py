"""Checkpoints from which a run resumes as if it had never stopped."""

from pathlib import Path
from typing import Any

import torch
from fsspec.core import url_to_fs  # type: ignore[import-untyped]
from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn

from grade_lightning.errors import InputError
from grade_lightning.files import atomic


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, and moves it there once it is whole and on the disk.

    So a kill or a full disk leaves what lay there before. Stock Lightning writes into the temporary folder of the
    machine, and from there copies over the earlier file where that is on another disk.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write it.

        Raises:
            InputError: the disk is full, or the folder cannot be written to.
        """
        files, name = url_to_fs(str(path))
        if storage_options is not None or not isinstance(files, LocalFileSystem):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        whole = Path(name)
        # Lightning counts what has "ckpt_" in its name, whatever the rest of it
        part = whole.with_name("." + whole.name.replace("ckpt", "part"))
        try:
            whole.parent.mkdir(parents=True, exist_ok=True)
            with atomic(whole, "wb", part) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:
            reason = error if isinstance(error, OSError) else error.__context__  # torch hides what failed
            if not isinstance(reason, OSError):
                raise
            raise InputError(
                f"{whole}: the checkpoint cannot be written ({reason.strerror}); earlier ones are unchanged: free "
                "some space, and resume from the latest with --ckpt_path last"
            ) from error


class Checkpoint(ModelCheckpoint):
    """Lightning's `ModelCheckpoint`, for runs that are to resume exactly.

    It also keeps the last step of a run that is counted in steps, writes by :class:`AtomicCheckpointIO`, makes sure
    that the curves on the disk reach up to the checkpoint, and never saves between the micro-batches of an optimizer
    step, whose gradients a checkpoint does not hold.

    Example:
        >>> trainer = Trainer(callbacks=[Checkpoint(every_n_train_steps=50)], logger=False, accelerator="cpu")
    """

    _overdue = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write whole files, unless the user chose how to write."""
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        super().setup(trainer, pl_module, stage)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when it is time, and at the last step."""
        if trainer.fit_loop._should_accumulate():
            return
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._overdue:
            super().on_validation_end(trainer, pl_module)
        if trainer.global_step == trainer.max_steps:
            self._save_the_end(trainer)
        self._overdue = False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step of a run that is counted in epochs or minutes."""
        super().on_train_end(trainer, pl_module)
        self._save_the_end(trainer)

    def _save_the_end(self, trainer: Trainer) -> None:
        if self._should_skip_saving_checkpoint(trainer):
            return
        candidates = self._monitor_candidates(trainer)
        if self.monitor is None or self.monitor in candidates:
            self._save_topk_checkpoint(trainer, candidates)
        else:
            rank_zero_warn(f"checkpoint.monitor = {self.monitor} was never logged; the last step is saved instead")
            self._save_none_monitor_checkpoint(trainer, candidates)
        self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Any]) -> None:
        try:
            super()._save_topk_checkpoint(trainer, monitor_candidates)
        except MisconfigurationException as error:
            names = ", ".join(sorted(name for name in monitor_candidates if name.startswith("val/")))
            raise InputError(
                f"checkpoint.monitor = {self.monitor}: nothing is logged by that name; there are {names}"
            ) from error

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save; amid the micro-batches of a step, only once it is complete."""
        self._overdue = trainer.state.fn == "fit" and trainer.fit_loop._should_accumulate()
        if not self._overdue:
            super().on_validation_end(trainer, pl_module)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        flush(trainer)
        super()._save_checkpoint(trainer, filepath)


def flush(trainer: Trainer) -> None:
    """Bring to the disk what loggers still hold, which a kill would take; Lightning does so after its own metrics."""
    for logger in trainer.loggers:
        logger.save()
