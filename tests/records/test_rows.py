"""Rows of batches of any make."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import BatchEncoding

from grade_lightning.records import batch_rows, slice_rows


class Pair(NamedTuple):
    """As a data set may hand out."""

    x: Tensor
    names: list[str]


def test_a_named_tuple_stays_one() -> None:
    part = slice_rows(Pair(torch.arange(3), ["a", "b", "c"]), 1, 2)
    assert isinstance(part, Pair)
    assert (part.x.tolist(), part.names) == ([1, 2], ["b", "c"])


def test_a_batch_encoding_stays_one() -> None:
    batch = BatchEncoding({"input_ids": torch.arange(6).view(3, 2), "scale": torch.tensor(2.0)})
    part = slice_rows(batch, 0, 1)
    assert isinstance(part, BatchEncoding)
    assert batch_rows(batch) == 3
    assert part["input_ids"].tolist() == [[0, 1]]
    assert part["scale"] == 2.0


@pytest.mark.parametrize("batch", ["text", {}, [torch.tensor(1.0)]], ids=str)
def test_rows_that_cannot_be_counted(batch: Any) -> None:
    with pytest.raises(ValueError, match="without a tensor"):
        batch_rows(batch)
