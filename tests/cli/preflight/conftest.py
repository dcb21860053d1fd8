"""A preflight as a user asks for it: what it prints, what it measured, and what it refuses."""

import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import grade_lightning.methods
from grade_lightning.modules import AlignmentModule, TrainableModule
from tests.cli.conftest import Run, Shelf

tables = import_module("grade_lightning_cli.preflight.tables")
METHODS = {
    name: value
    for name, value in vars(grade_lightning.methods).items()
    if isinstance(value, type) and issubclass(value, TrainableModule)
}
FULL = ["--data.max_prompt_tokens=8", "--data.max_text_tokens=8", "--model.sampler.min_new_tokens=6"]  # of both texts
Look = Callable[..., tuple[str, Any]]


def arguments(shelf: Shelf, method: str) -> list[str]:
    """A whole run of any method."""
    taken = ["--trainer", "--data"]
    if issubclass(METHODS[method], AlignmentModule):
        taken.append("--model.")
    elif method == "SupervisedFineTuning":
        taken.append("--model.policy")
    backbone = [f"--model.backbone={shelf.policy}"] if method == "RewardModel" else []
    given = (arg for arg in shelf.all if arg.startswith(tuple(taken)))
    return [f"--model={method}", *given, *backbone, "--data.batch_size=8"]


@pytest.fixture
def look(run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Look:
    """Run a preflight; give what it prints and what it measured. It may leave nothing."""
    found: list[Any] = []
    needs = tables.needs

    def watched(memory: Any, *args: Any) -> Any:
        found.append(memory)
        return needs(memory, *args)

    monkeypatch.setattr(tables, "needs", watched)

    def look(*args: str) -> tuple[str, Any]:
        before = files()
        capsys.readouterr()
        run("fit", *args, "--preflight")
        assert files() == before
        return capsys.readouterr().out, found[-1]

    return look


@pytest.fixture
def refuse(run: Run, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a preflight that must end with one line and status 2; give the line. It may leave nothing."""

    def refuse(*args: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            run("fit", *args, "--preflight")
        assert exit.value.code == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("grade-fit: error: ")
        assert not Path("runs").exists()
        return line

    return refuse


def files() -> set[Path]:
    """All here, but what Python keeps of modules that it imports."""
    return {path for path in Path().rglob("*") if "__pycache__" not in path.parts}


def cell(table: str, row: str) -> str:
    """The cell beside this one."""
    return str(re.findall(rf"^│ {re.escape(row)} +│ +(.+?) +│", table, re.MULTILINE)[0])
