"""Work in the background, for rewards that wait for something."""

from abc import abstractmethod
from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

from torch import Tensor

from grade_lightning.records import Rollout, Scores

from .base import Reward

T = TypeVar("T")


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
