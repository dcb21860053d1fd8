"""Rewards that are Python functions."""

import inspect
import logging
import math
import sysconfig
import time
import traceback
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Set
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grade_lightning.errors import InputError, check_range
from grade_lightning.records import Rollout
from grade_lightning.waiting import wait_for

from .background import BackgroundReward, begun
from .conversations import Messages, conversations, with_answer


class FunctionReward(BackgroundReward):
    """A Python function `f(prompts, completions, **columns) -> list[float | None]`, as in TRL; or `async def f(…)`.

    Args:
        function: the function, or its dotted path in YAML. It gets the texts and every other column of the data by
            keyword, and returns one number for each completion, in a list, an array, a tensor or one after another;
            None abstains. A step in which one is infinite or NaN is left out. If it has a parameter `completion_ids`,
            it gets the completions' tokens, the end token included; `messages`: the conversations, each with the
            completion as the assistant's last words (None where the prompt is no conversation).
        timeout: seconds that a call may take; None: as many as it likes. After that the run ends with an error.
            Python cannot stop the call: it goes on in a thread that ends with the process.
        background: go on drawing completions during the call, `at_once` of the sampler at a time. For a function
            that waits for a server or another process; it must not draw from torch's global random numbers.

    Example:
        >>> def shortness(prompts, completions, **columns):
        ...     return [-len(text) for text in completions]
        >>> FunctionReward(shortness).name
        'shortness'
    """

    def __init__(self, function: Callable[..., Any], timeout: float | None = None, background: bool = False) -> None:
        super().__init__()
        check_range("(0, inf)", "reward", timeout=timeout)
        self.function = function
        self.timeout = timeout
        self.background = background
        self._wanted = _parameters(function)

    @property
    def name(self) -> str:
        """The function's name."""
        return getattr(self.function, "__name__", type(self.function).__name__)

    def ask(self, rollout: Rollout) -> Callable[[], Tensor]:
        """Call the function.

        Raises:
            InputError: it raises, takes too long, or does not return one number or None for each completion; in the
                background, from what is returned.
        """
        columns = {key: value for key, value in rollout.columns.items() if key not in ("prompts", "completions")}
        columns |= {"prompts": rollout.prompts, "completions": rollout.completions}
        columns |= {name: make(rollout) for name, make in _ON_DEMAND.items() if name in self._wanted}

        @torch.no_grad()
        def call() -> Any:
            values = self.function(**columns)
            if inspect.isawaitable(values):
                values = wait_for(_result(values))
            return list(values) if isinstance(values, Iterator) else values

        values = call if self.timeout is None and not self.background else _within(self.timeout, call)
        if self.background:
            return lambda: self._scores(rollout, values)
        scores = self._scores(rollout, values)
        return lambda: scores

    def _scores(self, rollout: Rollout, call: Callable[[], Any]) -> Tensor:
        """What a call returns, as scores."""
        try:
            values = call()
        except _TooLongError:
            raise InputError(
                f"reward {self.name}: no answer within {self.timeout} s for {len(rollout.completions)} completions; "
                "make the function faster or raise its timeout"
            ) from None
        except Exception as error:
            reason, (where, frames) = " ".join(str(error).split()), _raised_at(error)
            _log.error("reward %s: raised %s, called from\n%s", self.name, type(error).__name__, frames)
            raise InputError(
                f"reward {self.name}: the function raised {type(error).__name__}: {reason} ({where}); its calls "
                "are above"
            ) from error
        values = values.tolist() if hasattr(values, "tolist") else values
        if not isinstance(values, Iterable) or isinstance(values, _NO_LISTS):
            raise InputError(f"reward {self.name}: must return a list of numbers or None, not {_short(values)}")
        scores = [_number(value, self.name) for value in values]
        if len(scores) != len(rollout.completions):
            raise InputError(f"reward {self.name}: {len(scores)} values for {len(rollout.completions)} completions")
        return torch.tensor(scores, dtype=torch.float32, device=rollout.completion_ids.device)


def _completion_ids(rollout: Rollout) -> list[list[int]]:
    return [ids[:n] for ids, n in zip(rollout.completion_ids.tolist(), rollout.lengths.tolist(), strict=True)]


def _messages(rollout: Rollout) -> list[Messages | None]:
    pairs = zip(conversations(rollout), rollout.completions, strict=True)
    return [None if talk is None else with_answer(talk, completion) for talk, completion in pairs]


_ON_DEMAND: dict[str, Callable[[Rollout], list[Any]]] = {"completion_ids": _completion_ids, "messages": _messages}
"""What a function gets only if it names it."""


def _parameters(function: Callable[..., Any]) -> Set[str]:
    """Names of a function's parameters; none where they are not known, as of some that are written in C."""
    try:
        return inspect.signature(function).parameters.keys()
    except (TypeError, ValueError):
        return frozenset()


_log = logging.getLogger(__name__)
_INSTALLED = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})


def _raised_at(error: BaseException) -> tuple[str, str]:
    """File and line of the user's code in which an error arose, and its calls from there on."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    own = [frame for frame in frames if not frame.filename.startswith(_INSTALLED)] or frames
    where = f"{Path(own[-1].filename).name}, line {own[-1].lineno}" if own else "not in Python"
    return where, "".join(traceback.format_list(frames)).rstrip()


_NO_LISTS = (str, bytes, Mapping, Set)


class _TooLongError(Exception):
    """A call has not returned in time."""


def _within(timeout: float | None, call: Callable[[], Any]) -> Callable[[], Any]:
    """Begin a call in a thread of its own; what is returned waits for its result, up to `timeout` seconds from now."""
    answer, began = begun(call), time.monotonic()

    def result() -> Any:
        left = None if timeout is None else max(0.0, began + timeout - time.monotonic())
        if wait([answer], left).not_done:
            raise _TooLongError
        return answer.result()

    return result


async def _result(values: Awaitable[Any]) -> Any:
    return await values


def _number(value: Any, name: str) -> float:
    """A float; a NaN that the function computed is a mistake and no abstention."""
    if value is None:
        return math.nan
    try:
        number = float(value) if not isinstance(value, (str, bytes)) else None
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None:
        raise InputError(f"reward {name}: must return a list of numbers or None, not of {_short(value)}")
    return math.inf if math.isnan(number) else number


def _short(value: Any) -> str:
    return " ".join(f"{value!r:.60}".split())
