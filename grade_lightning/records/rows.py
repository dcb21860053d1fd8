"""Rows of a batch of any make: counted and sliced."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


def batch_rows(batch: Any) -> int:
    """Rows of a batch of any make: those of the first tensor in it.

    Raises:
        ValueError: there is no tensor in it.

    Example:
        >>> import torch
        >>> batch_rows(({"label": torch.zeros(4)}, torch.zeros(4, 2)))
        4
    """
    for tensor in _tensors(batch):
        return len(tensor)
    raise ValueError(f"a batch of type {type(batch).__name__} without a tensor: its rows cannot be counted")


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor) and batch.dim():
        yield batch
    elif isinstance(batch, (Mapping, list, tuple)):
        for value in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(value)


def slice_rows(batch: Any, start: int, count: int) -> Any:
    """Some rows of a batch of any make: of tensors and lists that have as many rows as the batch; the rest stays.

    Example:
        >>> import torch
        >>> slice_rows({"input_ids": torch.tensor([[1], [2]]), "columns": {"label": [0, 1]}}, 1, 1)
        {'input_ids': tensor([[2]]), 'columns': {'label': [1]}}
    """
    rows, taken = batch_rows(batch), slice(start, start + count)

    def part(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[taken] if value.dim() and len(value) == rows else value
        if isinstance(value, Mapping):
            items = {name: part(x) for name, x in value.items()}
            return items if isinstance(value, dict) else type(value)(items)  # type: ignore[call-arg]
        if isinstance(value, list) and len(value) == rows and not any(isinstance(x, Tensor) for x in value):
            return value[taken]
        if isinstance(value, (list, tuple)):
            parts = [part(x) for x in value]
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        return value

    return part(batch)
