"""What is no number, for any logger: tables, histograms and figures.

TensorBoard, Weights & Biases and MLflow have each a form of their own for it. Other loggers that have a folder, the CSV
logger among them, get files there: `val/completions/100.csv`.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from torch import Tensor

from grade_lightning.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, str | float]]
BINS = 30


def log_table(trainer: Trainer, name: str, rows: Rows, markdown: str, step: int) -> None:
    """Write a table.

    Args:
        trainer: its loggers are written to, by the first process alone.
        name: such as `val/completions`.
        rows: one mapping a row, all of the same columns.
        markdown: the same for those who show text.
        step: the optimizer step.
    """
    columns = list(rows[0]) if rows else []
    for logger in _loggers(trainer):
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(name, markdown, step)
        elif isinstance(logger, WandbLogger):
            logger.log_table(name, columns, [list(row.values()) for row in rows], step=step)
        elif isinstance(logger, MLFlowLogger):
            data = {column: [row[column] for row in rows] for column in columns}
            logger.experiment.log_table(_run(logger), data, f"{name}/{step}.json")
        else:
            _write_csv(logger, name, step, columns, [list(row.values()) for row in rows])


def log_histogram(trainer: Trainer, name: str, values: Tensor, step: int) -> None:
    """Write how values are spread.

    Args:
        trainer: its loggers are written to, by the first process alone.
        name: such as `val/rewards`.
        values: finite numbers; nothing is written where there are none.
        step: the optimizer step.
    """
    numbers = values.detach().float().cpu()
    if not len(numbers):
        return
    for logger in _loggers(trainer):
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_histogram(name, numbers, step)
            continue
        counts, edges = np.histogram(numbers.double().numpy(), bins=BINS)
        if isinstance(logger, WandbLogger):
            from wandb import Histogram  # type: ignore[import-not-found, unused-ignore]

            metrics: dict[str, Any] = {name: Histogram(np_histogram=(counts, edges))}
            logger.log_metrics(metrics, step)
        elif isinstance(logger, MLFlowLogger):
            found = {"counts": counts.tolist(), "edges": edges.tolist()}
            logger.experiment.log_dict(_run(logger), found, f"{name}/{step}.json")
        else:
            bins = [[*ends] for ends in zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True)]
            _write_csv(logger, name, step, ["from", "to", "count"], bins)


def log_figure(trainer: Trainer, name: str, figure: "Figure", step: int) -> None:
    """Write a figure of matplotlib.

    Args:
        trainer: its loggers are written to, by the first process alone.
        name: such as `probe/noise`.
        figure: the figure, which stays open.
        step: the optimizer step.
    """
    for logger in _loggers(trainer):
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_figure(name, figure, step, close=False)
        elif isinstance(logger, WandbLogger):
            logger.log_image(name, [figure], step=step)
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_figure(_run(logger), figure, f"{name}/{step}.png")
        elif (path := _place(logger, f"{name}/{step}.png")) is not None:
            figure.savefig(path)


def _loggers(trainer: Trainer) -> list[Logger]:
    return list(trainer.loggers) if trainer.is_global_zero else []


def _run(logger: MLFlowLogger) -> str:
    found = logger.run_id
    assert found is not None  # it is made when it is asked for
    return found


def _place(logger: Logger, name: str) -> Path | None:
    """A file in the folder of a logger, None where it has none."""
    folder = logger.log_dir or logger.save_dir
    if folder is None:
        return None
    path = Path(folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _write_csv(logger: Logger, name: str, step: int, columns: list[str], rows: list[list[Any]]) -> None:
    path = _place(logger, f"{name}/{step}.csv")
    if path is not None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([columns, *rows])
        write_atomically(path, text.getvalue())
