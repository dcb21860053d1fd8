"""Signals that end a run between two steps: a job of SLURM that is about to end, and SIGTERM."""

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from .checkpoint import flush


class Requeue(Callback):
    """Where SLURM is about to end the job: save at the end of the step, and ask SLURM to start the job again.

    Stock Lightning does so at once, in the middle of whatever it is at, and a run that resumes from there is another
    one. The checkpoint is `checkpoints/requeue.ckpt` in the trainer's `default_root_dir`. Without SLURM, or where its
    environment says `auto_requeue=False`, nothing happens.
    """

    _waits = False
    _asked = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the signal from Lightning, which puts things back at the end."""
        self._take_over()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same: there are validations before and after the training."""
        self._take_over()

    def _take_over(self) -> None:
        if not SLURMEnvironment.detect():
            return
        handler = signal.getsignal(signal.SIGUSR1)
        if callable(handler) and handler != self._ask:
            self._waits, self._asked = True, False
            signal.signal(signal.SIGUSR1, self._ask)

    def _ask(self, *_: Any) -> None:
        self._asked = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Answer, if a step is complete."""
        if not trainer.fit_loop._should_accumulate():
            self._answer(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same; before and after the training there is nothing to save."""
        if trainer.state.fn != "fit" or not trainer.fit_loop._should_accumulate():
            self._answer(trainer)

    def _answer(self, trainer: Trainer) -> None:
        """On all processes, if one of them was asked: the signal may reach them in different steps."""
        if not self._waits or not trainer.strategy.reduce_boolean_decision(self._asked, all=False):
            return
        self._waits = False
        flush(trainer)
        if trainer.state.fn == "fit":
            trainer.save_checkpoint(Path(trainer.default_root_dir, "checkpoints", "requeue.ckpt"))
        if trainer.is_global_zero:
            array = os.environ.get("SLURM_ARRAY_JOB_ID")
            job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]
            try:
                subprocess.run(["scontrol", "requeue", job], check=True)
            except (OSError, subprocess.SubprocessError) as error:  # it is not in every container
                rank_zero_warn(f"the run is saved, but SLURM could not be asked to start it again: {error}")


class Terminate(Callback):
    """End several processes between the same two steps when one of them is sent SIGTERM.

    Stock Lightning asks the others from within the signal's handler, in the middle of whatever they are at, and may
    wait for them forever.
    """

    _asked = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the signal from Lightning, which puts things back at the end."""
        self._take_over(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same: there are validations before and after the training."""
        self._take_over(trainer)

    def _take_over(self, trainer: Trainer) -> None:
        if trainer.world_size > 1 and callable(signal.getsignal(signal.SIGTERM)):
            signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, *_: Any) -> None:
        self._asked = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """End, after what the step before had to save is saved."""
        self._answer(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End."""
        self._answer(trainer)

    def _answer(self, trainer: Trainer) -> None:
        if trainer.world_size > 1 and trainer.strategy.reduce_boolean_decision(self._asked, all=False):
            raise SIGTERMException
