"""The progress bar."""

from pathlib import Path

from lightning.pytorch.loggers import TensorBoardLogger

from grade_lightning.callbacks import Progress
from tests.callbacks.runs import Saves, trainer


def test_progress_counts_steps(tmp_path: Path) -> None:
    bar = Progress()
    assert bar._get_train_description(3) == "Training"
    run = trainer(tmp_path, bar, enable_progress_bar=True, logger=TensorBoardLogger(tmp_path))
    assert "v_num" not in bar.get_metrics(run, Saves())
