"""Work in the background, for rewards that wait for something."""

import asyncio
import os
from abc import abstractmethod
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from functools import cache
from threading import Thread
from typing import Any, TypeVar

from torch import Tensor

from grade_lightning.records import Rollout, Scores

from .base import Reward

T = TypeVar("T")


def wait_for(work: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine, or what it raises.

    In a thread of its own, since a notebook has a loop in ours; a forked process has a thread of its own, too.

    Example:
        >>> async def answer():
        ...     return 42
        >>> wait_for(answer())
        42
    """
    return asyncio.run_coroutine_threadsafe(work, _loop(os.getpid())).result()


class BackgroundReward(Reward):
    """A reward that waits for something, and lets it go on while the next completions are drawn."""

    @abstractmethod
    def ask(self, rollout: Rollout) -> Callable[[], Tensor]:
        """Begin to score; what is returned waits for the scores, (B,)."""

    def forward(self, rollout: Rollout) -> Tensor:
        """Scores, (B,); NaN to abstain."""
        return self.ask(rollout)()

    def begin(self, rollout: Rollout) -> Callable[[], Scores]:
        """Begin to score; what is returned waits for the scores."""
        answer = self.ask(rollout)

        def finish() -> Scores:
            total = answer()
            return Scores(total, {self.name: total})

        return finish


def begun(call: Callable[[], T]) -> Future[T]:
    """A call that goes on in a thread of its own, which ends with the process.

    Example:
        >>> begun(lambda: 42).result()
        42
    """
    answer: Future[T] = Future()

    def work() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:
            answer.set_exception(error)

    Thread(target=work, daemon=True).start()
    return answer


@cache
def _loop(process: int) -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    Thread(target=loop.run_forever, daemon=True).start()
    return loop
