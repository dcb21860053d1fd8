"""For which runs processes are started, and when one has failed."""

import os
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.cli.compare.conftest import Comparison, plan

module = import_module("grade_lightning_cli.compare.workers")
compare = import_module("grade_lightning_cli.compare").compare


def test_no_process_is_started_for_a_run_that_another_is_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison = Comparison(tmp_path / "out", plan("A,B,C", seeds=[1]))
    first, second, third = comparison.runs()
    started: list[str] = []
    monkeypatch.setattr(module, "start", lambda run, *_: started.append(run.name))
    workers = module.Workers(comparison, jobs=1, threads=None, work=compare)
    with first.claimed():
        workers.start()
        compare(["--out", str(tmp_path / "out"), "--list"])
    assert started == [second.name]
    assert workers.elsewhere == {first}
    assert not (first.folder / "log.txt").exists()
    printed = [line.split()[-1] for line in capsys.readouterr().out.splitlines()]
    assert printed == [second.name, third.name]
    workers.at.clear()
    workers.start()
    assert started[1:] == [first.name]


def test_a_process_that_leaves_nothing_has_failed(tmp_path: Path) -> None:
    """Though it says that it succeeded; else it would be started again and again."""
    comparison = Comparison(tmp_path / "out", plan("A", seeds=[1]))
    (run,) = comparison.runs()
    workers = module.Workers(comparison, jobs=1, threads=None, work=compare)
    for status, failed in ((module.ELSEWHERE, set()), (0, {run})):
        workers.at[run] = SimpleNamespace(poll=lambda status=status: status), 0
        workers.collect()
        assert (workers.at, workers.failed) == ({}, failed)


def test_threads_are_of_the_cores_that_a_job_may_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    comparison = Comparison(tmp_path / "out", plan("A", seeds=[1]))
    assert module.Workers(comparison, jobs=2, threads=None, work=compare).threads == 3
    assert module.Workers(comparison, jobs=8, threads=None, work=compare).threads == 1


def test_it_waits_for_a_process_and_not_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(module.time, "sleep", lambda seconds: clock.append(clock.pop() + seconds))
    comparison = Comparison(tmp_path / "out", plan("A,B", seeds=[1]))
    workers = module.Workers(comparison, jobs=2, threads=None, work=compare)
    one, other = comparison.runs()
    workers.at[one] = SimpleNamespace(poll=lambda: None), 0
    workers.wait(30)
    assert clock == [30.0]
    workers.at[other] = SimpleNamespace(poll=lambda: 0 if clock[0] >= 40 else None), 1
    workers.wait(30)
    assert clock == [40.0]
