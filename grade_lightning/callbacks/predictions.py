"""Predictions as JSON lines."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from grade_lightning.errors import InputError
from grade_lightning.records import Evaluation


class PredictionWriter(BasePredictionWriter):
    """Write one JSON object a line, of what is predicted or tested.

    The file appears when it is complete. With several processes each writes its own, `NAME.rank1.jsonl` and so on.

    Args:
        output: the file; `predictions.jsonl` in the trainer's folder by default. It must not exist.
    """

    def __init__(self, output: str | None = None) -> None:
        super().__init__("batch")
        self.output = output
        self.path = Path()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a file that exists.

        Raises:
            InputError: it does.
        """
        if stage in ("predict", "test"):
            folder = trainer.log_dir or "."  # asks all processes
            self.path = Path(self.output) if self.output else Path(folder) / "predictions.jsonl"
            if trainer.global_rank > 0:
                self.path = self.path.with_suffix(f".rank{trainer.global_rank}{self.path.suffix}")
            if self.path.exists():
                raise InputError(f"{self.path}: exists already; give --output another name")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._part.write_text("")

    @property
    def _part(self) -> Path:
        return self.path.with_name(self.path.name + ".part")

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
        with self._part.open("a", encoding="utf-8") as file:
            for row in prediction:
                file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Append a batch."""
        found = outputs.get("evaluation") if isinstance(outputs, Mapping) else None
        if isinstance(found, Evaluation):
            self.write_on_batch_end(trainer, pl_module, found.rows(), None, batch, batch_idx, dataloader_idx)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the file its name."""
        self.on_predict_end(trainer, pl_module)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the file its name."""
        os.replace(self._part, self.path)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave nothing half-written."""
        self._part.unlink(missing_ok=True)
