"""What memory there is."""

from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch

inventory = import_module("grade_lightning_cli.preflight.inventory")


def test_a_gpu_has_what_is_free_and_what_it_holds_for_us(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30, 80))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 20)
    module: Any = SimpleNamespace(device=torch.device("cuda"))
    assert inventory.room(None, module) == 50
