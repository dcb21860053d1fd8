"""How far a run is, and that it ends with the process that started it."""

import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from grade_lightning.errors import InputError
from grade_lightning.files import write_atomically
from grade_lightning.modules.trainable import batching_of

PARENT = "GRADE_COMPARE_PARENT"
"""Names the process that a run ends with."""


class Watch(Callback):
    """Says in a file how far the run is; ends it when the process that started it has ended."""

    def __init__(self, path: Path) -> None:
        self.path, self.last = path, 0.0
        self.parent = int(os.environ.get(PARENT, 0))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse epochs whose last step would be of fewer batches than the others.

        Raises:
            InputError: they are.
        """
        batches, micro = trainer.num_training_batches, trainer.accumulate_grad_batches
        window = max(micro, batching_of(pl_module).steps_per_batch)
        if batches % window and trainer.max_steps * micro > batches:
            raise InputError(
                f"an epoch has {batches} batches, no multiple of {window}: its last step would be of fewer than the "
                "others; choose trainer.accumulate_grad_batches or data.prompt_size so that it is one"
            )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Write now and then."""
        if self.parent and os.getppid() != self.parent:
            os.kill(os.getpid(), signal.SIGTERM)  # which ends a run between two steps
        if time.monotonic() - self.last > 2:
            self.last = time.monotonic()
            reward = trainer.callback_metrics.get("train/reward")
            state = {
                "step": trainer.global_step,
                "of": trainer.max_steps,
                "reward": None if reward is None else float(reward),
            }
            with suppress(OSError):  # a full disk is no reason to end a run
                write_atomically(self.path, json.dumps(state))
