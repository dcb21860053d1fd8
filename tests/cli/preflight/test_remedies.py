"""What a preflight advises where a batch does not fit."""

import re
from importlib import import_module
from typing import Any

import pytest

from tests.cli.conftest import Shelf
from tests.cli.preflight.conftest import Look, arguments
from tests.conftest import mostly_slow

inventory = import_module("grade_lightning_cli.preflight.inventory")
CHECKPOINTING = "--model.policy.gradient_checkpointing"


@pytest.mark.parametrize("method", mostly_slow(["GradeSTE", "RLOO", "SupervisedFineTuning"], "RLOO"))
def test_settings_that_are_named_are_enough(
    method: str, refuse: Any, look: Look, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = [*arguments(shelf, method), "--data.batch_size=16"]
    _, memory = look(*args)
    room = memory.total(12)
    _, memory = look(*args, CHECKPOINTING, "true")
    helps = memory.total(16) <= room  # not where a phase without a graph needs most
    monkeypatch.setattr(inventory, "room", lambda *_: room / 0.9)
    line = refuse(*args)
    ways = re.findall(r"set (--\S+ \S+)(?: (--\S+ \S+))?,", line)
    assert helps or method == "GradeSTE"
    assert [way.split()[0] for way, _ in ways] == ["--data.batch_size", *[CHECKPOINTING] * helps]
    for way in ways:
        _, memory = look(*args, *(part for setting in way for part in setting.split()))  # is not refused
        size, micro = 16, 1
        for name, value in (setting.split() for setting in way if setting):
            size = int(value) if name == "--data.batch_size" else size
            micro = int(value) if name == "--trainer.accumulate_grad_batches" else micro
        assert size * micro == 16
        assert memory.total(size) <= room
