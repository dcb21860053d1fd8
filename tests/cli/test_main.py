"""The programs themselves: their help, their status, and the first command of the README."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Run, Shelf, load, scalar, version


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_help_and_version_are_for_people(command: str, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        run(command, "--help")
    assert not exit.value.code
    out = capsys.readouterr().out
    assert f"grade-{command}" in out
    assert "--model" in out
    assert ("--output" in out) == (command in ("predict", "test"))


def test_help_on_a_method(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        run("fit", "--model.help", "GradeSTE")
    assert not exit.value.code
    assert "--model.kl_prefix" in capsys.readouterr().out


def test_main_is_importable_and_takes_arguments(shelf: Shelf) -> None:
    """What an entry point calls also takes a list, for notebooks and scripts."""
    fit: Any = load("fit")
    assert fit([*shelf.all, "--trainer.limit_val_batches=0"]) is None
    assert (version() / "export" / "config.json").is_file()


@pytest.mark.slow
def test_the_module_is_grade_fit(tmp_path: Path) -> None:
    """As a process, so that its status is what a shell sees."""
    command = [sys.executable, "-m", "grade_lightning_cli", "--model", "GradeSTF"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2
    assert "did you mean 'GradeSTE'?" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_first_command_of_the_readme(tmp_path: Path) -> None:
    """On a fresh machine without network: it trains its own models, aligns, and the measurements say so."""
    environment = os.environ | {"GRADE_LIGHTNING_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    (tmp_path / "work").mkdir()
    command = [sys.executable, "-m", "grade_lightning_cli", "--model", "GradeSTE", "--trainer.accelerator", "cpu"]
    done = subprocess.run(
        command, cwd=tmp_path / "work", env=environment, capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "before (step 0)" in done.stdout
    assert "after (step 300)" in done.stdout
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"bundled-v1", "bundled-v1.lock"}
    folder = tmp_path / "work" / version()
    first, last = ({name: scalar(folder, f"val/{name}")[i] for name in FINAL} for i in (0, -1))
    assert 0.4 <= first["reward"] <= 0.6
    assert 0.3 <= first["rewards/grammar_positive"] <= 0.6
    assert first["kl"] == pytest.approx(0, abs=1e-3)
    assert last["reward"] >= 0.90
    assert last["kl"] <= 20
    assert last["rewards/grammar_positive"] >= 0.85


FINAL = ("reward", "kl", "rewards/grammar_positive")
