"""Predictions as JSON lines."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from grade_lightning.errors import InputError


class PredictionWriter(BasePredictionWriter):
    """Write one JSON object a line: prompt, completion, reward, KL, and each reward's own value.

    The file appears when it is complete. With several processes each writes its own, `NAME.rank1.jsonl` and so on.

    Args:
        output: the file; `predictions.jsonl` in the run's own folder by default. It must not exist.
    """

    def __init__(self, output: str | None = None) -> None:
        super().__init__("batch")
        self.output = output
        self._rows = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a file that exists.

        Raises:
            InputError: it does.
        """
        if stage == "predict":
            path = self.path(trainer)
            if path.exists():
                raise InputError(f"{path}: exists already; give --output another name")
            path.parent.mkdir(parents=True, exist_ok=True)
            self._part(trainer).write_text("")
            self._rows = 0

    def path(self, trainer: Trainer) -> Path:
        """This process's file."""
        path = Path(self.output) if self.output else Path(trainer.log_dir or ".") / "predictions.jsonl"
        return path if trainer.global_rank == 0 else path.with_suffix(f".rank{trainer.global_rank}{path.suffix}")

    def _part(self, trainer: Trainer) -> Path:
        path = self.path(trainer)
        return path.with_name(path.name + ".part")

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Append a batch."""
        with self._part(trainer).open("a", encoding="utf-8") as file:
            for row in prediction:
                file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        self._rows += len(prediction)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the file its name."""
        os.replace(self._part(trainer), self.path(trainer))
