"""Arguments in any order, and the help of nested parts, as a user writes them."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.conftest import Run, Shelf

build = import_module("grade_lightning_cli.config").build


def test_a_bare_optimizer_is_torchs(printed_config: Any) -> None:
    """Also where another package has one of that name."""

    class SGD(torch.optim.Optimizer):
        pass

    SGD.__module__, SGD.__qualname__ = __name__, "SGD"
    globals()["SGD"] = SGD
    model = printed_config("--model", "RLOO", "--model.optimizer", "SGD")["model"]["init_args"]
    assert model["optimizer"]["class_path"] == "torch.optim.SGD"


def test_options_before_their_class(printed_config: Any, shelf: Shelf) -> None:
    """Of the data, of a reward, and of an optimizer, with or without an equals sign."""
    config = printed_config(
        *("--data.source.train", str(shelf.reviews), "--model.reward.path=somewhere", "--model.optimizer.lr", "0.5"),
        *(
            "--data.source",
            "LocalFiles",
            "--model",
            "RLOO",
            "--model.optimizer=SGD",
            "--model.reward",
            "ClassifierReward",
        ),
    )
    assert config["data"]["source"]["init_args"]["train"] == str(shelf.reviews)
    model = config["model"]["init_args"]
    assert model["reward"]["init_args"]["path"] == "somewhere"
    assert model["optimizer"] == {"class_path": "torch.optim.SGD", "init_args": model["optimizer"]["init_args"]}
    assert model["optimizer"]["init_args"]["lr"] == 0.5


@pytest.mark.parametrize(
    ("args", "option"),
    [
        (["--model.policy.help"], "--model.policy.path"),
        (["--model.policy.help", "Policy"], "--model.policy.path"),
        (["--model.reward.help=ClassifierReward"], "--model.reward.output"),
        (["--model.sampler.help"], "--model.sampler.top_k"),
        (["--data.source.help", "LocalFiles"], "--data.source.train"),
    ],
)
def test_help_names_options_as_they_are_written(
    args: list[str], option: str, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        run("fit", "--model=RLOO", *args)
    assert not exit.value.code
    shown = capsys.readouterr().out
    assert f"\n  {option}" in shown
    prefix = option.rpartition(".")[0]
    assert [word for word in shown.split() if word.startswith(("--", "[--")) and prefix not in word] == []


def test_help_of_one_of_several_classes(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        run("fit", "--model=RLOO", "--model.reward.help")
    assert exit.value.code == 2
    assert "--model.reward.help: say of which class: ClassifierReward, Constrained" in capsys.readouterr().err


def test_a_learning_rate_where_it_is_not(run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        run("fit", "--model=RLOO", "--model.lr=0.1")
    assert "error: --model.lr: no such option, did you mean --model.optimizer.lr?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("grade_lightning.optim.DCTAdamW", {"rank": 8, "error_feedback": True}),
        ("grade_lightning.optim.GaLore", {"rank": 8, "gap": 10}),
        ("pytorch_optimizer.DiffGrad", {"weight_decay": 0.0}),
    ],
)
def test_optimizers_of_ours_and_of_others_by_class_path(name: str, options: dict[str, Any], shelf: Shelf) -> None:
    """They train the policy, whose matrices are 16 wide."""
    if not name.endswith("DCTAdamW"):
        pytest.importorskip("pytorch_optimizer")
    flags = [f"--model.optimizer.{key}={value}" for key, value in {**options, "lr": 0.01}.items()]
    model = build([*shelf.all, f"--model.optimizer={name}", *flags]).model
    model.configure_model()
    optimizer = model.configure_optimizers()["optimizer"]
    assert type(optimizer).__name__ == name.rpartition(".")[2]
    assert optimizer.param_groups[0]["lr"] == 0.01
    ranks = [group.get("rank") for group in optimizer.param_groups]
    assert (8 in ranks) is ("rank" in options)
