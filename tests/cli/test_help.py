"""The help on one screen: every option in it is there, and it leads on."""

import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Run

help = import_module("grade_lightning_cli.help")


@pytest.fixture
def asked(run: Run, capsys: pytest.CaptureFixture[str]) -> Any:
    def asked(command: str, *args: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            run(command, *args)
        assert not exit.value.code
        return capsys.readouterr().out

    return asked


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_it_fits_a_screen(command: str) -> None:
    lines = help.short(command).splitlines()
    assert len(lines) <= 52
    assert max(map(len, lines)) <= 120


def test_asked_for_alone(asked: Any) -> None:
    assert asked("fit", "--model", "GradeSTE", "--help") == help.short("fit")
    assert asked("test", "-h") == help.short("test")


def test_every_option_in_it_is_there(printed_config: Any) -> None:
    config = printed_config(
        "--model=GradeSTE",
        *("--model.policy.lora.r=16", "--model.reward=ClassifierReward", "--data.source=LocalFiles"),
        "--data.source.train=prompts.csv",
    )

    def has(node: Any, keys: list[str]) -> bool:
        if isinstance(node, dict) and "init_args" in node:
            node = node["init_args"]
        return not keys or (isinstance(node, dict) and keys[0] in node and has(node[keys[0]], keys[1:]))

    options = re.findall(r"^  (?:-c, )?--([\w.]+)", help.short("fit"), re.MULTILINE)
    assert len(options) > 20
    assert [name for name in options if not has(config, name.split("."))] == ["config", "preflight"]


def test_a_topic_is_shown_whole_and_alone(asked: Any) -> None:
    out = asked("fit", "--help", "export")
    assert set(re.findall(r"--([\w]+)\.", out)) == {"export"}
    assert "--export.push_to_hub" in out
    assert "--trainer.barebones" in asked("fit", "--help", "all")


def test_an_unknown_topic_is_one_line(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        run("fit", "--help", "engines")
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "--help engines: no such topic; there are trainer, data" in line


@pytest.mark.slow
def test_argcomplete_completes_an_option(tmp_path: Path) -> None:
    pytest.importorskip("argcomplete")
    line = "grade-fit --trainer.max_st"
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9"}
    asked["_ARGCOMPLETE_STDOUT_FILENAME"] = str(tmp_path / "found")
    code = "import sys; sys.argv = ['grade-fit']; from grade_lightning_cli.main import fit; fit()"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | asked, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "found").read_text().strip() == "--trainer.max_steps"
