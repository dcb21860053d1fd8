"""What a run says while it goes on, and when it ends."""

import errno
import os
import signal
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.cli.compare.conftest import Comparison, plan

Watch = import_module("grade_lightning_cli.compare.watch").Watch


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")  # as the system says it: without a name

    comparison = Comparison(tmp_path, plan("A"))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*chosen\.json"):
        comparison.note_choices()
    assert {path.name for path in tmp_path.iterdir()} == {"plan.yaml", "lock"}
    trainer = SimpleNamespace(callback_metrics={}, global_step=1, max_steps=2)
    Watch(tmp_path / "progress.json").on_train_batch_end(trainer, None)  # goes on


def test_a_run_ends_with_what_started_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda *args: killed.append(args))
    trainer = SimpleNamespace(callback_metrics={}, global_step=1, max_steps=2)
    for parent, ended in ((None, 0), (os.getppid(), 0), (1 + os.getppid(), 1)):
        if parent is not None:
            monkeypatch.setenv("GRADE_COMPARE_PARENT", str(parent))
        Watch(tmp_path / "progress.json").on_train_batch_end(trainer, None)
        assert len(killed) == ended
    assert killed == [(os.getpid(), signal.SIGTERM)]
