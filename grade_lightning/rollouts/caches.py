"""What a model keeps of the tokens that it has read."""

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from grade_lightning.policies import Policy

ROOM = 64
"""Tokens for which memory is taken at a time."""


class RoomyLayer(DynamicLayer):
    """Keys and values with room for the next tokens, which are written there: the parent class copies all each time."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)  # type: ignore[no-untyped-call]
        self._rooms: list[Tensor | None] = [None, None]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add tokens.

        Args:
            key_states: (B, heads, new tokens, width), without a graph.
            value_states: the same.
            *args: not used.
            **kwargs: not used.

        Returns:
            Those of all tokens, views of memory that later tokens do not change.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self._rooms[0] = _appended(self.keys, key_states, self._rooms[0])
        self.values, self._rooms[1] = _appended(self.values, value_states, self._rooms[1])
        return self.keys, self.values


def _appended(known: Tensor | None, new: Tensor, room: Tensor | None) -> tuple[Tensor, Tensor]:
    """Known and new tokens, and the memory in which they are."""
    length = 0 if known is None or not known.numel() else known.shape[-2]
    end = length + new.shape[-2]
    if known is None or room is None or known.data_ptr() != room.data_ptr() or room.shape[-2] < end:
        room = new.new_empty(*new.shape[:-2], end + ROOM, new.shape[-1])  # at first, when it is full, or rows left
        if known is not None and length:
            room[..., :length, :] = known
    room[..., length:end, :] = new
    return room[..., :end, :], room


def keys_and_values(policy: Policy) -> DynamicCache | None:
    """An empty cache of keys and values; None where the model keeps something else, such as a recurrent state."""
    cache = DynamicCache(config=policy.base.config.get_text_config())
    plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
    if not plain or policy.base._is_stateful:
        return None
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
