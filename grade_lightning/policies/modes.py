"""A model that is, or computes, in another way for a while."""

from collections.abc import Callable, Iterator
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


@contextmanager
def with_forward(module: Any, function: Callable[..., Any]) -> Iterator[None]:
    """A module that computes in another way for a while; a `forward` that somebody has put there comes back.

    Example:
        >>> from torch import nn
        >>> layer = nn.Linear(2, 2)
        >>> with with_forward(layer, lambda x: "called"):
        ...     layer(None)
        'called'
    """
    own = vars(module).get("forward")
    module.forward = function
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
