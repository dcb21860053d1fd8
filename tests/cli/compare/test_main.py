"""The command: what it lists, refuses and names, and what is left after an interruption."""

import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from tests.cli.compare.conftest import GRID, Comparison, arguments, finish, plan, refused
from tests.cli.conftest import Shelf

compare = import_module("grade_lightning_cli.compare").compare
main = import_module("grade_lightning_cli.compare.main")


def test_a_method_without_a_setting_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    comparison = Comparison(tmp_path / "out", plan("A,B", grid=GRID, seeds=[1]))
    for run, objective in zip(comparison.runs(), (None, None, 0.1, 0.2), strict=True):
        finish(comparison, run, objective, tested=True)
    assert "error: A: no setting to choose" in refused(capsys, "--out", str(tmp_path / "out"))


def test_a_list_of_jobs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    compare(["--out", out, "--methods", "GradeSTE,RLOO", "--seeds", "1,2", "--completions=32", "--list"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"grade-compare --out {tmp_path / 'out'} --run GradeSTE/default/seed_1"
    assert len(lines) == 4


def test_what_stands_behind_the_line_is_for_all(tmp_path: Path) -> None:
    for name in ("a.yaml", "b.yaml"):
        Path(name).touch()
    own = ["--out", str(tmp_path / "out"), "--methods=RLOO", "--completions=32", "--arguments.model.beta=1", "--list"]
    compare([*own, "--", "--data.seed", "3", "--a=b=c", "--config", "a.yaml", "--config=b.yaml", "--x+=1", "--x+=2"])
    assert yaml.safe_load((tmp_path / "out/plan.yaml").read_text())["arguments"] == {
        "model.beta": 1,
        "data.seed": "3",
        "a": "b=c",
        "config": ["a.yaml", "b.yaml"],
        "x+": ["1", "2"],
    }


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("-- --data.seed", "one value each"),
        ("-- 3 --data.seed", "one value each"),
        ("-- --data.seed 3 --data.seed=4", "--data.seed is given twice"),
        ("--seeds 1,2", "seeds: given without methods; give the whole plan"),
        ("--completions 9600 -- --data.seed 3", "completions, arguments: given without methods"),
        ("--run foo", "--run foo: not in the plan; give METHOD/SETTING/seed_N, such as RLOO/default/seed_1"),
        ("--run RLOO/default/seed_x", "not in the plan"),
        ("--run NOPE/default/seed_1", "not in the plan"),
        ("--run RLOO/lr=1/seed_1", "not in the plan"),
        ("--run RLOO/default/seed_3", "not in the plan"),
        ("--jobs 0", "jobs = 0: must be 1 or more"),
        ("--threads 0", "threads = 0: must be 1 or more"),
    ],
)
def test_a_wrong_command(wrong: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Comparison(tmp_path / "out", plan("RLOO", seeds=[1, 2]))
    assert says in refused(capsys, "--out", str(tmp_path / "out"), *wrong.split())
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {"plan.yaml", "lock"}


@pytest.mark.slow
def test_killed_and_started_again(shelf: Shelf, tmp_path: Path) -> None:
    """By SIGTERM, SIGKILL and a failing method: what was finished is not repeated, the rest is done."""
    what = {
        "methods": {"RLOO": None, "GradeSTE": None, "broken": {"model": "RLOO", "model.num_generations": 3}},
        "arguments": arguments(shelf),
        "seeds": [1, 2],
        "completions": 32,
    }
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(what))
    command = [sys.executable, "-m", "grade_lightning_cli.compare", "--config", "plan.yaml", "--out", "out"]
    first = tmp_path / "out/runs/RLOO/default/seed_1/test.json"

    def start(until: Path | None) -> subprocess.Popen[str]:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 300
        while until is not None and not until.is_file() and time.monotonic() < deadline:
            time.sleep(0.2)
        return process

    process = start(until=first)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    stamp = first.stat().st_mtime_ns
    process = start(until=None)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 2
    assert "2 runs failed (broken/default/seed_1, broken/default/seed_2)" in err
    assert "no multiple of model.num_generations" in out
    assert first.stat().st_mtime_ns == stamp
    assert len(list(tmp_path.glob("out/runs/*/default/*/test.json"))) == 4
    assert not any(p.name.endswith(".part") for p in tmp_path.rglob("*"))
    assert os.path.exists(tmp_path / "out/chosen.json")


def test_signals_end_the_command_unless_they_are_off(monkeypatch: pytest.MonkeyPatch) -> None:
    handlers: dict[int, Any] = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    off = {signal.SIGHUP}  # by nohup
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_IGN if number in off else signal.SIG_DFL)
    main._end_by_signals()
    assert set(handlers) == {signal.SIGINT, signal.SIGTERM}
    with pytest.raises(SystemExit) as ended:
        handlers[signal.SIGINT](signal.SIGINT, None)
    assert ended.value.code == 130
