"""The process of a run: what it is given, where what it says goes, and how it ends."""

import os
import signal
import subprocess
import sys
import threading
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.compare.conftest import Comparison, plan

module = import_module("grade_lightning_cli.compare.start")
ELSEWHERE = import_module("grade_lightning_cli.compare.workers").ELSEWHERE
ended_by_sigterm = (-signal.SIGTERM, 128 + signal.SIGTERM)


@pytest.fixture
def run(tmp_path: Path) -> Any:
    (run,) = Comparison(tmp_path / "out", plan("A", seeds=[1])).runs()
    run.folder.mkdir(parents=True)
    return run


@pytest.fixture
def forking(monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.platform != "linux":
        pytest.skip("nowhere else is a run forked")
    monkeypatch.setattr(module, "forks", lambda: True)


@pytest.mark.usefixtures("forking")
def test_a_fork_has_its_own_log_threads_and_environment(run: Any) -> None:
    def work(arguments: list[str]) -> None:
        print(arguments, os.environ["OWN"], os.environ["OMP_NUM_THREADS"], torch.get_num_threads(), os.getppid())
        os.system("echo from a program")  # which writes to the descriptor
        raise SystemExit(ELSEWHERE)

    process = module.start(run, 3, {"OWN": "mine"}, work)
    assert process.wait() == process.poll() == ELSEWHERE
    said = (run.folder / "log.txt").read_text()
    assert f"{[f'--out={run.out}', f'--run={run.name}']} mine 3 3 {os.getpid()}" in said
    assert "from a program" in said
    assert "OWN" not in os.environ


@pytest.mark.usefixtures("forking")
def test_a_fork_that_fails_says_why(run: Any) -> None:
    def work(_: list[str]) -> None:
        raise RuntimeError("the reason")

    assert module.start(run, 1, {}, work).wait() == 1
    assert "RuntimeError: the reason" in (run.folder / "log.txt").read_text()


@pytest.mark.usefixtures("forking")
def test_a_fork_is_ended_as_a_program_is(run: Any) -> None:
    """Though its parent hears signals otherwise."""
    kept = signal.signal(signal.SIGTERM, lambda *_: None)
    read, write = os.pipe()

    def work(_: list[str]) -> None:
        os.write(write, b"!")
        signal.pause()

    try:
        process = module.start(run, 1, {}, work)
        os.read(read, 1)
        assert process.poll() is None
        process.terminate()
        assert process.wait() in ended_by_sigterm
    finally:
        signal.signal(signal.SIGTERM, kept)


def test_a_fork_is_safe_only_alone_and_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = {"platform": "linux", "threads": 1, "gpu": False}
    for change, safe in (({}, True), ({"platform": "darwin"}, False), ({"threads": 2}, False), ({"gpu": True}, False)):
        state = alone | change
        monkeypatch.setattr(sys, "platform", state["platform"])
        monkeypatch.setattr(threading, "active_count", lambda state=state: state["threads"])
        monkeypatch.setattr(torch.cuda, "is_available", lambda state=state: state["gpu"])
        assert module.forks() is safe


def test_elsewhere_a_program_is_started(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr(module, "forks", lambda: False)
    monkeypatch.setattr(subprocess, "Popen", lambda command, **how: started.append((command, how["env"])))
    module.start(run, 3, {"OWN": "mine"}, lambda _: None)
    ((command, environment),) = started
    assert command[1:] == ["-m", "grade_lightning_cli.compare", f"--out={run.out}", f"--run={run.name}"]
    assert (environment["OWN"], environment["OMP_NUM_THREADS"]) == ("mine", "3")
