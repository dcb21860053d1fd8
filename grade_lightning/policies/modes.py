"""Modes: a model in evaluation mode for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def evaluating(model: Any) -> Iterator[Any]:
    """A model in evaluation mode (no dropout, no checkpointing, the cache usable); each part's mode comes back.

    In training mode with gradient checkpointing transformers drops the key-value cache with only a warning, and every
    token is sampled without its context.

    Example:
        >>> from torch import nn
        >>> layer = nn.Dropout()
        >>> with evaluating(layer):
        ...     print(layer.training)
        False
        >>> layer.training
        True
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield model
    finally:
        for module, mode in modes.items():
            module.training = mode
