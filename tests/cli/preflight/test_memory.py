"""What is counted of the memory."""

import doctest
from importlib import import_module

import pytest
import torch

from grade_lightning.policies.prepacked import can_prepack, prepacked

memory = import_module("grade_lightning_cli.preflight.memory")
tables = import_module("grade_lightning_cli.preflight.tables")


def test_what_is_alive_at_the_same_time() -> None:
    x = torch.ones(1000, requires_grad=True)
    with memory.LiveTensors() as live:
        y = x.exp() * 2
        assert live.now == 4000 + 4000  # what exp has saved for its backward pass, and y
        view = y[:10].view(2, 5)
        view.detach().zero_()
        assert live.now == 8000
        y.sum().backward()
        assert live.now == 4000 + 4000 + 4000 - 4000  # y, x.grad and nothing that was saved
    del y, view
    assert live.now == 4000
    assert live.peaks["loss"] >= 12000


def test_the_functions_of_the_estimate() -> None:
    for module in (memory, tables):
        assert doctest.testmod(module).failed == 0


@pytest.mark.skipif(not can_prepack(), reason="only for oneDNN on x86")
def test_weights_in_another_layout_count_until_they_are_freed() -> None:
    """They have no storage that could be asked."""
    layer = torch.nn.Linear(32, 64, bias=False)
    with memory.LiveTensors() as live:
        before = live.now
        with prepacked(layer):
            assert live.now - before == layer.weight.nbytes
        assert live.now == before
