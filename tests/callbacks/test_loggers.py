"""Tables, histograms and figures in each logger; the real ones of others where they are installed."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger

from grade_lightning.callbacks import Completions, GradientVariance
from grade_lightning.callbacks.loggers import BINS, log_figure, log_histogram, log_table
from tests.callbacks.runs import judged_by, ones, rows, trainer
from tests.callbacks.watching import MeanRow, fit

ROWS: list[dict[str, str | float]] = [
    {"prompt": 'a, "b"', "reward": 0.5},
    {"prompt": "two\nlines", "reward": -1.0},
]
VALUES = torch.tensor([0.0, 0.0, 1.0, 3.0], dtype=torch.bfloat16)


def log_all(run: Trainer) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure()
    log_table(run, "val/completions", ROWS, "| as text |", 7)
    log_histogram(run, "val/rewards", VALUES, 7)
    log_figure(run, "probe/noise", figure, 7)


def table(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_a_logger_with_a_folder_gets_files(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    log_all(trainer(tmp_path, logger=logger))
    assert table(tmp_path / "val/completions/7.csv") == [
        ["prompt", "reward"],
        ['a, "b"', "0.5"],
        ["two\nlines", "-1.0"],
    ]
    head, *bins = table(tmp_path / "val/rewards/7.csv")
    assert head == ["from", "to", "count"]
    assert len(bins) == BINS
    counts = [int(count) for *_, count in bins]
    assert (counts[0], sum(counts), counts[-1]) == (2, 4, 1)
    assert (float(bins[0][0]), float(bins[-1][1])) == (0, 3)
    assert (tmp_path / "probe/noise/7.png").read_bytes()[1:4] == b"PNG"


def test_every_logger_of_a_run_gets_all(tmp_path: Path) -> None:
    loggers = [CSVLogger(tmp_path, name="", version="one"), DummyLogger(), CSVLogger(tmp_path, name="", version="two")]
    log_all(trainer(tmp_path, logger=loggers))
    one, two = (
        {path.relative_to(tmp_path / name) for path in (tmp_path / name).rglob("*.*")} for name in ("one", "two")
    )
    assert one == two
    assert len(one) == 3


def test_another_process_than_the_first_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path, logger=CSVLogger(tmp_path, name="", version=""))
    monkeypatch.setattr(type(run), "is_global_zero", False)
    log_all(run)
    assert not list(tmp_path.iterdir())


def test_nothing_to_show_is_no_histogram(tmp_path: Path) -> None:
    log_histogram(trainer(tmp_path, logger=CSVLogger(tmp_path, name="", version="")), "val/rewards", torch.ones(0), 0)
    assert not list(tmp_path.iterdir())


def test_a_run_with_the_csv_logger_shows_its_completions(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    module = judged_by(ones)
    trainer(tmp_path, Completions(rows=2), logger=logger).validate(module, rows(), verbose=False)
    head, *shown = table(tmp_path / "val/completions/0.csv")
    assert head == ["prompt", "completion", "reward", "KL (nats)"]
    found = module.last_evaluation.rollout
    assert [row[:2] for row in shown] == [list(pair) for pair in zip(found.prompts, found.completions, strict=True)][:2]
    assert [float(row[2]) for row in shown] == [1.0, 1.0]
    assert (tmp_path / "val/rewards/0.csv").is_file()


def test_a_probe_with_the_csv_logger_leaves_its_figure_and_its_texts(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    data = torch.tensor([1.0, 1.0, -1.0, -1.0]).unsqueeze(1) * torch.ones(1, 6)
    watch = GradientVariance(probe_every_n_steps=1, draws=2)
    fit(MeanRow(), [data], watch, logger=CSVLogger(tmp_path, name="", version=""))
    assert (tmp_path / "probe/noise/0.png").is_file()
    head, most, *_ = table(tmp_path / "probe/opposing/0.csv")
    assert head == ["pair", "one side", "the other"]
    assert most[0] == "cosine -1.00"


@pytest.mark.slow
def test_weights_and_biases_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What its own folder of the run holds."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, offline=True, project="p")
    log_all(trainer(tmp_path, logger=logger))
    summary: dict[str, Any] = dict(logger.experiment.summary)
    wandb.finish()
    assert summary["val/completions"]["_type"] == "table-file"
    assert (summary["val/completions"]["nrows"], summary["val/completions"]["ncols"]) == (2, 2)
    assert summary["val/rewards"]["_type"] == "histogram"
    assert sum(summary["val/rewards"]["values"]) == 4
    assert summary["probe/noise"]["_type"] == "images/separated"
    assert summary["trainer/global_step"] == 7
    (media,) = tmp_path.glob("wandb/offline-run-*/files/media/table/val/*.table.json")
    assert json.loads(media.read_text())["data"] == [list(row.values()) for row in ROWS]
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/probe/*.png"))) == 1


@pytest.mark.slow
def test_mlflow_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # newer ones prefer a database
    logger = MLFlowLogger(tracking_uri=f"file:{tmp_path / 'mlruns'}")
    log_all(trainer(tmp_path, logger=logger))
    (artifacts,) = (tmp_path / "mlruns").glob("*/*/artifacts")
    shown = json.loads((artifacts / "val/completions/7.json").read_text())
    assert (shown["columns"], shown["data"]) == (["prompt", "reward"], [list(row.values()) for row in ROWS])
    found = json.loads((artifacts / "val/rewards/7.json").read_text())
    assert (sum(found["counts"]), found["edges"][0], found["edges"][-1]) == (4, 0, 3)
    assert (artifacts / "probe/noise/7.png").read_bytes()[1:4] == b"PNG"


def test_tensorboard_keeps_its_own_forms(tmp_path: Path) -> None:
    from tests.cli.conftest import events

    logger = TensorBoardLogger(tmp_path, name="", version="")
    log_all(trainer(tmp_path, logger=logger))
    logger.experiment.flush()
    found = events(tmp_path)
    (text,) = found.Tensors("val/completions/text_summary")
    assert text.tensor_proto.string_val == [b"| as text |"]
    assert found.Histograms("val/rewards")[0].histogram_value.num == 4
    assert found.Images("probe/noise")[0].step == 7
