"""A memory of prompts: what is merged, what is forgotten, and the same table for any number of processes."""

import io
from typing import Any

import pytest
import torch
from torch import Tensor

from grade_lightning.distributed import Reduce
from grade_lightning.memory import PromptMemory


def add(known: Tensor | None, new: Tensor) -> Tensor:
    return new if known is None else known + new


class Two(Reduce):
    """As if another process had seen these."""

    def __init__(self, other: list[Any]) -> None:
        super().__init__()
        self.other = other

    def gather(self, value: Any) -> list[Any]:
        return [value, self.other]


def table(memory: PromptMemory) -> dict[int, list[float]]:
    state = memory.state_dict()
    return dict(zip(state["keys"].tolist(), state["values"].tolist(), strict=True))


def test_what_is_seen_again_is_merged() -> None:
    memory = PromptMemory()
    memory.update([3, 1], torch.tensor([[1.0, 2.0], [3.0, 4.0]]), add)
    memory.update([1, 9, 1], torch.tensor([[1.0, 1.0], [5.0, 5.0], [1.0, 1.0]]), add)
    assert table(memory) == {3: [1, 2], 1: [5, 6], 9: [5, 5]}
    assert memory.get(4) is None


def test_the_longest_unseen_is_forgotten() -> None:
    memory = PromptMemory(capacity=2)
    for key in (1, 2, 1, 3):
        memory.update([key], torch.ones(1, 1), add)
    assert table(memory) == {1: [2], 3: [1]}


def test_rows_of_two_processes_make_the_table_of_one() -> None:
    """Also the order in which prompts are going to be forgotten."""
    keys, values = [5, 2, 8, 2], torch.arange(8.0).view(4, 2)
    alone, shared = PromptMemory(), PromptMemory()
    alone.update(keys, values, add)
    shared.update(keys[:2], values[:2], add, Two(list(zip(keys[2:], values[2:].double(), strict=True))))
    assert list(table(alone).items()) == list(table(shared).items())


@pytest.mark.parametrize("count", [0, 3])
def test_it_goes_through_a_checkpoint(count: int) -> None:
    memory, again = PromptMemory(), PromptMemory()
    if count:
        memory.update([2**62, 1, 7], torch.rand(3, 2), add)
    file = io.BytesIO()
    torch.save(memory.state_dict(), file)
    file.seek(0)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert list(table(again).items()) == list(table(memory).items())
    again.update([1], torch.ones(1, 2), add)
    assert len(again) == max(count, 1)
