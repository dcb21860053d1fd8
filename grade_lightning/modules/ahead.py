"""One rollout behind: a batch's completions are drawn while those of the batch before are trained on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, ClassVar

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from grade_lightning.corrections import EngineCorrection
from grade_lightning.distributed import Reduce
from grade_lightning.errors import InputError
from grade_lightning.policies import Policy
from grade_lightning.records import Prompts, Rollout
from grade_lightning.rollouts import Sampler

Waiting = Callable[[], Rollout]
"""Waits for completions."""


class Ahead:
    """The completions that are drawn, or are being drawn, for the next batch.

    Those of the first batch are trained on twice, and those of the last one not at all.

    Args:
        waiting: what is drawn already.

    Example:
        >>> ahead, drawn = Ahead(), iter("abc")
        >>> [ahead.take(lambda: lambda x=next(drawn): x) for _ in range(3)]
        ['a', 'a', 'b']
    """

    def __init__(self, waiting: Waiting | None = None) -> None:
        self._waiting = waiting

    def take(self, begin: Callable[[], Waiting]) -> Rollout:
        """Begin to draw, and return what was begun before; that is done by then, so its engine may have new weights."""
        before = None if self._waiting is None else self._waiting()
        self._waiting = cache(begin())
        return self._waiting() if before is None else before

    def pack(self) -> dict[str, Any] | None:
        """For a checkpoint, once it is drawn."""
        return None if self._waiting is None else self._waiting().pack()


class DrawingAhead:
    """Draws the completions of a module that trains; with `sampler.one_behind` one batch ahead."""

    takes_older: ClassVar[bool] = False
    """Whether the method can train on completions of earlier weights."""

    policy: Policy
    sampler: Sampler
    reduce: Reduce
    correction: EngineCorrection | None = None
    """Weights for an engine that draws from a slightly different policy; of methods that take one."""
    global_step: int
    global_rank: int
    device: torch.device

    _ahead: Ahead
    _collecting = False

    def draw(self, prompts: Prompts, groups: Tensor | None = None) -> Rollout:
        """Completions to train on, with the global random state; arguments as in :class:`Sampler`."""
        given = self.policy, prompts, groups, self.global_step
        if not (self._collecting and self.sampler.one_behind):
            return self.sampler(*given)
        return self._ahead.take(partial(self.sampler.begin, *given))

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """What is drawn meanwhile is trained on."""
        self._collecting = True
        try:
            yield
        finally:
            self._collecting = False

    def check_ahead(self) -> None:
        """Check that the method can do with completions of the batch before.

        Raises:
            InputError: it cannot.
        """
        if not self.sampler.one_behind:
            return
        if not self.takes_older:
            raise InputError(
                f"sampler.one_behind: {type(self).__name__} needs completions of the policy as it is; leave it out"
            )
        if self.correction is None:
            rank_zero_warn(
                "sampler.one_behind: completions are one rollout old and nothing corrects that; set --model.correction "
                "EngineCorrection, or watch train/engine_kl"
            )

    def pack_ahead(self) -> list[dict[str, Any] | None]:
        """Of every process what was drawn and not trained on; a checkpoint waits for it."""
        packed: list[dict[str, Any] | None] = self.reduce.gather(self._ahead.pack())
        return packed

    def unpack_ahead(self, packed: list[dict[str, Any] | None]) -> None:
        """The inverse; of another number of processes nothing is taken."""
        own = packed[self.global_rank] if len(packed) == self.reduce.processes else None
        if own is not None:
            self._ahead = Ahead(
                cache(lambda: Rollout.unpack(move_data_to_device(own, self.device), self.policy.tokenizer))
            )
