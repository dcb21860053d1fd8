"""Rewards that are Python functions: what they get, may return and do wrong; slow and asynchronous ones."""

import asyncio
import math
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from fractions import Fraction
from importlib import import_module
from pathlib import Path
from threading import Event
from typing import Any

import numpy
import pytest
import torch

from grade_lightning.errors import InputError
from grade_lightning.rewards import FunctionReward
from tests.rewards.making import constant, make_rollout

# ---- what goes in and comes out -------------------------------------------------------------------------------------


def test_a_function_gets_texts_and_columns_by_keyword() -> None:
    seen: dict[str, Any] = {}

    def rule(prompts: list[str], completions: list[str], label: list[int], **columns: Any) -> list[float | None]:
        seen.update(prompts=prompts, completions=completions, label=label, columns=columns)
        return [1, None, 0.5]

    rollout = make_rollout(label=[1, 0, 1], note=["a", "b", "c"], prompts=["x"], completions=["y"])
    reward = FunctionReward(rule)
    scores = reward.score(rollout)
    assert seen["prompts"] == rollout.prompts
    assert seen["completions"] == ["w4 w5 w6 w7", "w8", ""]
    assert seen["label"] == [1, 0, 1]
    assert seen["columns"] == {"note": ["a", "b", "c"]}
    assert scores.total.dtype == torch.float32
    assert scores.total[[0, 2]].tolist() == [1, 0.5]
    assert math.isnan(scores.total[1])
    assert list(scores.parts) == ["rule"]
    assert not reward.differentiable


def test_a_function_that_names_them_gets_tokens_and_conversations() -> None:
    seen: dict[str, Any] = {}

    def rule(completion_ids: list[list[int]], *, messages: Any, **columns: Any) -> list[float]:
        seen.update(completion_ids=completion_ids, messages=messages, columns=columns)
        return [1.0] * 3

    ask, begun = {"role": "user", "content": "w3"}, {"role": "assistant", "content": "w9 "}
    rollout = make_rollout(prompt=[[ask], [ask, begun], "w3"], completion_ids=[0, 0, 0])
    FunctionReward(rule).score(rollout)
    assert seen["completion_ids"] == [[4, 5, 6, 7], [8, 0], [0]]
    assert seen["messages"] == [
        [ask, {"role": "assistant", "content": "w4 w5 w6 w7"}],
        [ask, {"role": "assistant", "content": "w9 w8"}],
        None,
    ]
    assert seen["columns"].keys() == {"prompt", "prompts", "completions"}

    def other(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        seen["columns"] = columns
        return [1.0] * 3

    FunctionReward(other).score(make_rollout(label=[1, 2, 3]))
    assert seen["columns"].keys() == {"label"}


@pytest.mark.parametrize("values", [[1.0], [1.0] * 4, []])
def test_a_function_of_the_wrong_length_is_named(values: list[float]) -> None:
    with pytest.raises(InputError, match=rf"rule: {len(values)} values for 3 completions"):
        constant(*values).score(make_rollout())


NO_NUMBERS = [["a", 1, 2], ["1", "2", "3"], ["a\nb"] * 3, [[1], [2], [3]], [1j] * 3, [10**400] * 3, 1.0, None]
NO_LISTS = ["123", b"123", {0: 1, 1: 1, 2: 1}, {1, 2, 3}, torch.tensor(1.0), torch.ones(3, 1), numpy.ones((3, 2))]


@pytest.mark.parametrize("value", NO_NUMBERS + NO_LISTS, ids=lambda value: type(value).__name__)
def test_a_function_of_the_wrong_type_is_named(value: Any) -> None:
    with pytest.raises(InputError, match=r"^reward rule: must return a list of numbers or None, not .+$"):
        returns(value).score(make_rollout())


def returns(value: Any, timeout: float | None = None) -> FunctionReward:
    def rule(**_: Any) -> Any:
        return value

    return FunctionReward(rule, timeout)


@pytest.mark.parametrize(
    "make",
    [
        lambda: [1, 0.5, True],
        lambda: (1, 0.5, 1),
        lambda: iter([1, 0.5, 1]),
        lambda: (value for value in [1, 0.5, 1]),
        lambda: {"a": 1, "b": 0.5, "c": 1}.values(),
        lambda: torch.tensor([1, 0.5, 1], dtype=torch.bfloat16, requires_grad=True),
        lambda: [torch.tensor(1), numpy.float32(0.5), Fraction(1)],
        lambda: numpy.array([1, 0.5, 1]),
        lambda: numpy.array([1, 0.5, True], dtype=object),
    ],
)
def test_a_function_may_return_numbers_in_many_forms(make: Callable[[], Any]) -> None:
    assert returns(make())(make_rollout()).tolist() == [1, 0.5, 1]


@pytest.mark.parametrize("form", [list, torch.tensor, numpy.array])
def test_a_nan_that_a_function_computes_is_a_mistake_and_no_abstention(form: Callable[..., Any]) -> None:
    """An infinite reward leaves its step out."""
    assert returns(form([1.0, math.nan, -math.inf]))(make_rollout()).tolist() == [1, math.inf, -math.inf]
    assert returns([1, None, math.nan])(make_rollout())[1].isnan()


def raising(error: BaseException) -> Iterator[float]:
    raise error
    yield 1.0


@pytest.mark.parametrize("timeout", [None, 60.0])
@pytest.mark.parametrize("lazily", [False, True])
def test_a_function_that_raises_is_named_in_one_line(lazily: bool, timeout: float | None) -> None:
    def rule(**_: Any) -> Any:
        values = raising(KeyError("no\nsuch column"))
        return values if lazily else list(values)

    with pytest.raises(InputError, match=r"^reward rule: the function raised KeyError: .*such column.*$"):
        FunctionReward(rule, timeout).score(make_rollout())


def test_a_function_that_is_interrupted_is_no_mistake_of_its_own() -> None:
    with pytest.raises(KeyboardInterrupt):
        returns(raising(KeyboardInterrupt())).score(make_rollout())


def test_a_function_gets_every_completion_as_text() -> None:
    """Also an empty one, and others than English."""
    rollout = make_rollout()
    rollout.completions = ["", "naïve 読む 🙂\u2028", "\ufffd"]
    seen: list[str] = []

    def rule(completions: list[str], **_: Any) -> list[float | None]:
        seen.extend(completions)
        return [float(len(text)) for text in completions]

    assert FunctionReward(rule)(rollout).tolist() == [0, 11, 1]
    assert seen == rollout.completions


def test_a_callable_object_is_named_by_its_class() -> None:
    class Brevity:
        def __call__(self, completions: list[str], **_: Any) -> list[float | None]:
            return [-float(len(text.split())) for text in completions]

    reward = FunctionReward(Brevity())
    assert reward.name == "Brevity"
    assert reward(make_rollout()).tolist() == [-4, -1, 0]


# ---- slow and asynchronous ones -------------------------------------------------------------------------------------


def test_a_slow_function_is_named_with_its_timeout() -> None:
    never = Event()
    reward = FunctionReward(lambda **_: never.wait(), timeout=0.05)
    with pytest.raises(InputError, match=r"no answer within 0\.05 s for 3 completions; make the function faster or"):
        reward.score(make_rollout())
    assert all(thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread())
    never.set()


def test_a_slow_generator_and_a_slow_coroutine_are_in_the_time_too() -> None:
    never = Event()
    with pytest.raises(InputError, match=r"no answer within 0\.05 s"):
        FunctionReward(lambda **_: (never.wait() for _ in range(3)), timeout=0.05).score(make_rollout())

    async def rule(**_: Any) -> list[float]:
        await asyncio.Event().wait()
        return [1, 2, 3]

    with pytest.raises(InputError, match=r"reward rule: no answer within 0\.05 s"):
        FunctionReward(rule, timeout=0.05).score(make_rollout())
    never.set()


def test_a_timeout_that_the_function_raises_itself_is_not_ours() -> None:
    with pytest.raises(InputError, match="the function raised TimeoutError: the server"):
        FunctionReward(lambda **_: list(raising(TimeoutError("the server"))), timeout=60).score(make_rollout())


@pytest.mark.slow
def test_a_run_whose_function_never_returns_ends() -> None:
    """With status 1 here, where nobody turns the error into 2; the thread does not keep the process alive."""
    code = """
import threading
from types import SimpleNamespace
from grade_lightning.rewards import FunctionReward
rollout = SimpleNamespace(prompts=["p"], completions=["c"], columns={})
FunctionReward(lambda **_: threading.Event().wait(), timeout=0.1)(rollout)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "no answer within 0.1 s for 1 completions" in done.stderr


class Asynchronous:
    """Its event loop must be the same in all calls, as a client's connections need it."""

    def __init__(self) -> None:
        self.loops: list[asyncio.AbstractEventLoop] = []

    async def __call__(self, completions: list[str], **_: Any) -> list[float | None]:
        await asyncio.sleep(0)
        self.loops.append(asyncio.get_running_loop())
        return [float(len(text.split())) for text in completions]


@pytest.mark.parametrize("timeout", [None, 60.0])
def test_an_asynchronous_function_is_awaited_within_a_running_loop_too(timeout: float | None) -> None:
    function = Asynchronous()
    reward = FunctionReward(function, timeout)

    async def notebook() -> list[float]:
        return reward.score(make_rollout()).total.tolist()

    assert reward(make_rollout()).tolist() == [4, 1, 0]
    assert asyncio.run(notebook()) == [4, 1, 0]
    assert function.loops[0] is function.loops[1]


def test_an_asynchronous_function_that_fails_is_named() -> None:
    async def rule(**_: Any) -> list[float]:
        raise ValueError("too many requests")

    with pytest.raises(InputError, match="reward rule: the function raised ValueError: too many requests"):
        FunctionReward(rule).score(make_rollout())


def test_an_exception_names_file_and_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """Of the user's code, also where a library raised it; the calls are in the log, once."""
    code = """import json

def inner(text):
    return json.loads(text)

def score(completions, **columns):
    return [inner(text) for text in completions]
"""
    (tmp_path / "mine_too.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    score = import_module("mine_too").score
    with pytest.raises(InputError, match=r"reward score: .* JSONDecodeError: .* \(mine_too.py, line 4\)"):
        FunctionReward(score)(make_rollout())
    (record,) = caplog.records
    assert "line 7, in score" in record.getMessage()
    assert "line 4, in inner" in record.getMessage()
