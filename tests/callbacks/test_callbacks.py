"""What one sees and keeps of a run, each callback by itself."""

import io
import json
import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
from torch.utils.data import DataLoader

from grade_lightning.callbacks import Completions, Export, PredictionWriter, Progress, Summary
from grade_lightning.callbacks.completions import completion_table
from grade_lightning.errors import InputError
from grade_lightning.methods import GradeSTE
from grade_lightning.policies import Policy
from grade_lightning.rewards import FunctionReward
from grade_lightning.rollouts import Rollout, Sampler
from tests.conftest import make_model, make_prompts, make_tokenizer


class Said(Rollout):
    """A rollout whose texts are given."""

    def __init__(self, prompts: list[str], completions: list[str]) -> None:
        self.__dict__.update(prompts=prompts, completions=completions)


def trainer(folder: Path, *callbacks: Any, **kwargs: Any) -> Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "max_steps": 2,
        "default_root_dir": folder,
    }
    return Trainer(callbacks=list(callbacks), **quiet | kwargs)


class Lengths(GradeSTE):
    """Judged by a function; never trained here."""

    backpropagates_reward = False


def module(function: Any) -> Lengths:
    policy = Policy.from_model(make_model("gpt2"), make_tokenizer())
    return Lengths(policy, FunctionReward(function), sampler=Sampler(max_new_tokens=4))


def rows(count: int = 2) -> DataLoader[Any]:
    return DataLoader([make_prompts() | {"columns": {}}] * count, batch_size=None)  # type: ignore[arg-type]


def ones(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    return [1.0 for _ in completions]


def nothing(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    return [None for _ in completions]


def infinite(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    return [math.inf for _ in completions]


# ---- Completions ----------------------------------------------------------------------------------------------


def test_a_table_whatever_is_in_the_texts() -> None:
    said = Said(["a | b", "two\nlines", "| |"], ["\n\n", "c|d\r\n\te", "plain"])
    table = completion_table(said, torch.tensor([0.5, float("nan"), 1.0]), torch.tensor([0.0, 1.25, 2.0]), rows=8)
    head, rule, *body = table.splitlines()
    assert body == [
        r"| a \| b |  | 0.500 | 0.00 |",
        r"| two lines | c\|d e | nan | 1.25 |",
        r"| \| \| | plain | 1.000 | 2.00 |",
    ]
    columns = {line.replace(r"\|", "").count("|") for line in (head, rule, *body)}
    assert columns == {5}


def test_a_table_of_so_many_rows() -> None:
    said = Said(["p"] * 5, ["c"] * 5)
    assert len(completion_table(said, torch.zeros(5), torch.zeros(5), rows=3).splitlines()) == 5
    assert len(completion_table(said, torch.zeros(5), torch.zeros(5), rows=9).splitlines()) == 7


@pytest.mark.parametrize(("function", "histogram"), [(ones, True), (nothing, False), (infinite, False)])
def test_completions_of_a_reward_without_a_number(function: Any, histogram: bool, tmp_path: Path) -> None:
    """Its rows are shown; there is nothing to put into a histogram."""
    logger = TensorBoardLogger(tmp_path, name="", version="")
    trainer(tmp_path, Completions(), logger=logger).validate(module(function), rows(), verbose=False)
    logger.experiment.flush()
    found = EventAccumulator(str(tmp_path))
    found.Reload()
    tags = found.Tags()
    assert tags["tensors"] == ["val/completions/text_summary"]
    assert tags["histograms"] == (["val/rewards"] if histogram else [])


def test_completions_need_no_tensorboard(tmp_path: Path) -> None:
    trainer(tmp_path, Completions()).validate(module(ones), rows(), verbose=False)
    assert not list(tmp_path.iterdir())


# ---- Export ---------------------------------------------------------------------------------------------------


class Saves(LightningModule):
    """Trains one number."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return cast(torch.Tensor, self.layer(torch.ones(1)).sum())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def plain() -> DataLoader[Any]:
    return DataLoader([torch.ones(1)] * 2, batch_size=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_export_refuses_what_holds_something(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "out"
    kept = target / "kept.txt" if kind == "folder" else target
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("kept")
    with pytest.raises(InputError, match=r"out: exists and is not empty; give --export\.folder another name"):
        trainer(tmp_path, Export(str(target))).fit(Saves(), plain())
    assert kept.read_text() == "kept"


def test_export_is_asked_only_to_train(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept.txt").write_text("kept")
    trainer(tmp_path, Export(str(tmp_path / "out"))).validate(module(ones), rows(1), verbose=False)


def test_export_takes_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    trainer(tmp_path, Export(str(tmp_path / "out"))).fit(Saves(), plain())


@pytest.mark.parametrize(
    ("export", "logger", "expected"),
    [
        (Export(), True, "runs/export"),
        (Export(), False, None),
        (Export("there"), False, "there"),
        (Export("there", enabled=False), True, None),
    ],
)
def test_where_an_export_goes(
    export: Export, logger: bool, expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = trainer(tmp_path, logger=TensorBoardLogger("runs", name="", version="") if logger else False)
    assert export.path(run) == (None if expected is None else Path(expected))


def test_no_export_of_a_fast_dev_run(tmp_path: Path) -> None:
    assert Export("there").path(trainer(tmp_path, fast_dev_run=True)) is None


# ---- PredictionWriter -----------------------------------------------------------------------------------------


def test_predictions_have_their_name_only_when_they_are_complete(tmp_path: Path) -> None:
    calls = []

    def fails_later(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        calls.append(sorted(path.name for path in tmp_path.iterdir()))
        if len(calls) == 2:
            raise OSError("disk full")
        return [1.0 for _ in completions]

    path = tmp_path / "a.jsonl"
    with pytest.raises(InputError, match="disk full"):
        trainer(tmp_path, PredictionWriter(str(path))).predict(module(fails_later), rows(), return_predictions=False)
    assert calls == [["a.jsonl.part"]] * 2
    assert not list(tmp_path.iterdir())

    trainer(tmp_path, PredictionWriter(str(path))).predict(module(ones), rows(), return_predictions=False)
    assert [item.name for item in tmp_path.iterdir()] == ["a.jsonl"]  # what was left is not in it
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(found) == 6
    assert {row["reward"] for row in found} == {1.0}


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_predictions_that_are_no_number_are_valid_json(value: float | None, tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.jsonl"
    policy = module(lambda completions, **columns: [value] * len(completions))
    trainer(tmp_path, PredictionWriter(str(path))).predict(policy, rows(1), return_predictions=False)
    lines = path.read_text().splitlines()
    assert lines
    assert [json.loads(line)["reward"] for line in lines] == [None] * len(lines)


def test_predictions_are_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("kept")
    with pytest.raises(InputError, match=r"a\.jsonl: exists already; give --output another name"):
        trainer(tmp_path, PredictionWriter(str(path))).predict(module(ones), rows(), return_predictions=False)
    assert path.read_text() == "kept"
    assert [item.name for item in tmp_path.iterdir()] == ["a.jsonl"]


# ---- Summary --------------------------------------------------------------------------------------------------


def printed(summary: Summary, where: dict[str, str]) -> str:
    text = io.StringIO()
    summary.print(where, Console(file=text, width=160))
    return text.getvalue()


def test_a_summary_of_nothing(tmp_path: Path) -> None:
    summary = Summary()
    assert summary.last_step is None
    assert printed(summary, {"logs": "runs/here"}) == "logs: runs/here\n"


def test_a_summary_of_one_measurement(tmp_path: Path) -> None:
    """As at the end of a run that went on: there is nothing to compare it with."""
    summary = Summary()
    trainer(tmp_path, summary).validate(module(ones), rows(1), verbose=False)
    text = printed(summary, {})
    assert summary.last_step == 0
    assert "before" not in text
    (line,) = [line for line in text.splitlines() if line.startswith("│ reward ")]
    assert [cell.strip() for cell in line.strip("│").split("│")] == ["reward", "1.000"]


def test_a_summary_shows_texts_as_they_are(tmp_path: Path) -> None:
    """Square brackets are not rich's markup."""

    def bracket(ids: Any, **_: Any) -> list[str]:
        return ["[bold]loud[/bold] [/nothing]" for _ in ids]

    judged = module(ones)
    judged.tokenizer.batch_decode = bracket  # type: ignore[method-assign, assignment]
    summary = Summary(completions=1)
    trainer(tmp_path, summary).validate(judged, rows(1), verbose=False)
    assert "[bold]loud[/bold]" in printed(summary, {})


def test_paths_are_not_markup() -> None:
    assert printed(Summary(), {"logs": "runs/[a]/b"}) == "logs: runs/[a]/b\n"


# ---- Progress -------------------------------------------------------------------------------------------------


def test_progress_counts_steps(tmp_path: Path) -> None:
    bar = Progress()
    assert bar._get_train_description(3) == "Training"
    run = trainer(tmp_path, bar, enable_progress_bar=True, logger=TensorBoardLogger(tmp_path))
    assert "v_num" not in bar.get_metrics(run, Saves())
