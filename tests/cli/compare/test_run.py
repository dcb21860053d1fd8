"""Who is at a run, and whether it is finished."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.compare.conftest import Comparison, finish, plan


@pytest.mark.slow
def test_one_process_at_a_run(tmp_path: Path) -> None:
    (run,) = Comparison(tmp_path / "out", plan("A", seeds=[1])).runs()
    with run.claimed() as one:
        command = [sys.executable, "-m", "grade_lightning_cli.compare", f"--out={run.out}", f"--run={run.name}"]
        other = subprocess.run(command, capture_output=True, text=True)
    assert one
    assert (other.returncode, other.stderr.strip()) == (75, f"grade-compare: another process is at {run.name}")
    assert not run.held


@pytest.mark.parametrize("content", ["", '{"objective": 1', "[]"])
def test_a_result_that_cannot_be_read_is_none(tmp_path: Path, content: str) -> None:
    comparison = Comparison(tmp_path / "out", plan("A", seeds=[1]))
    (run,) = comparison.runs()
    finish(comparison, run, 0.5, tested=True)
    assert comparison.complete()
    (run.folder / "test.json").write_text(content)
    assert (run.tested, comparison.complete()) == (False, False)
    (run.folder / "run.json").write_text(content)
    assert run.result is None
