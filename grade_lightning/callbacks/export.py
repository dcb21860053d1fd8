"""What was trained, as a Hugging Face folder."""

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from grade_lightning.errors import InputError
from grade_lightning.module import TrainableModule


class Export(Callback):
    """Write a Hugging Face folder at the end of training: what the next stage takes by path.

    Args:
        folder: where; `export` in the run's own folder by default. It must be empty or absent.
        enabled: whether to write at all.
    """

    def __init__(self, folder: str | None = None, enabled: bool = True) -> None:
        self.folder = folder
        self.enabled = enabled

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a folder that holds something.

        Raises:
            InputError: it does.
        """
        if stage == "fit" and self.folder is not None:
            self._refuse_what_exists(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to train a run further that has been exported.

        Raises:
            InputError: it has been.
        """
        self._refuse_what_exists(trainer)

    def _refuse_what_exists(self, trainer: Trainer) -> None:
        folder = self.path(trainer)
        if folder is not None and _holds_something(folder):
            raise InputError(f"{folder}: exists and is not empty; give --export.folder another name")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write it, unless there was nothing left to train: all processes gather what is spread, and the first one writes."""
        folder = self.path(trainer)
        if folder is None or trainer.strategy.broadcast(_holds_something(folder)):
            return
        if isinstance(pl_module, TrainableModule):
            folder.mkdir(parents=True, exist_ok=True)
            pl_module.save_pretrained(str(folder))

    def path(self, trainer: Trainer) -> Path | None:
        """Where the folder is written, None if it is not."""
        if not self.enabled or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return None
        if self.folder is not None:
            return Path(self.folder)
        return Path(trainer.log_dir) / "export" if trainer.log_dir and trainer.logger else None


def _holds_something(path: Path) -> bool:
    return path.exists() and (not path.is_dir() or any(path.iterdir()))
