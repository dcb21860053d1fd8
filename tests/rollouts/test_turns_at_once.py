"""Environments that answer at the same time, the faults of a few of them, and limits."""

import threading
from typing import Any, ClassVar

import pytest
import torch

from grade_lightning.errors import InputError
from grade_lightning.records import Prompts, Rollout
from grade_lightning.rollouts import Branching, Distribution, Environment, Turns
from tests.conftest import make_prompts
from tests.rollouts.rolling import make_policy
from tests.rollouts.test_turns import Scripted, Talks

PATIENCE = 60.0
"""Seconds after which somebody who waits for another gives up; nobody does when all is well."""


class Meets(Talks):
    """Answers only where another one is asked at the same time."""

    two = threading.Barrier(2)

    def step(self, text: str) -> tuple[list[dict[str, str]], float | None, bool]:
        self.two.wait(PATIENCE)
        return super().step(text)


class MeetsFirst(Talks):
    """Begins only where another one does at the same time."""

    two = threading.Barrier(2)

    def reset(self, row: dict[str, Any]) -> list[dict[str, str]]:
        self.two.wait(PATIENCE)
        return super().reset(row)


@pytest.mark.parametrize("environment", [Meets, MeetsFirst])
def test_two_answer_at_the_same_time(environment: type[Environment]) -> None:
    """Each of two needs the other one; four need no more."""
    prompts = Prompts.of(make_prompts((3, 2, 4, 1)))
    rollout = Turns(environment, max_turns=2, engine=Scripted(), workers=2).generate(
        make_policy(), Distribution(), prompts
    )
    assert rollout.columns["turn_rewards"] == [[1.0, 2.0]] * 4


@pytest.mark.parametrize("environment", [Meets, MeetsFirst])
def test_one_after_another_is_the_default(environment: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who needs another one waits in vain; a barrier of nobody says so at once."""
    barrier = threading.Barrier(2)
    barrier.abort()
    monkeypatch.setattr(environment, "two", barrier)
    with pytest.raises(InputError, match="BrokenBarrierError"):
        Turns(environment, engine=Scripted()).generate(make_policy(), Distribution(), Prompts.of(make_prompts()))


class Words(Environment):
    """Answers with what it heard, and has a reward of it."""

    def reset(self, row: dict[str, Any]) -> list[dict[str, str]]:
        self.left = row["turns"]
        return []

    def step(self, text: str) -> tuple[list[dict[str, str]], float | None, bool]:
        self.left -= 1
        return [{"role": "tool", "content": text[::-1]}], float(len(text)), self.left == 0


def drawn(kind: type[Turns], workers: int) -> Rollout:
    rows = [make_prompts((3, 2, 4))] * 2
    joined = {name: torch.cat([part[name] for part in rows]) for name in rows[0]}
    prompts = Prompts.of(joined | {"columns": {"turns": [1, 2, 3, 3, 1, 2]}})
    torch.manual_seed(0)
    engine = kind(Words, max_turns=3, turn_tokens=4, workers=workers)
    return engine.generate(make_policy(), Distribution(max_new_tokens=40), prompts)


@pytest.mark.parametrize("workers", [2, 5, 64])
@pytest.mark.parametrize("kind", [Turns, Branching])
def test_the_results_are_the_same_whatever_the_number(kind: type[Turns], workers: int) -> None:
    one, many = drawn(kind, 1), drawn(kind, workers)
    assert {name: x.tolist() for name, x in one.tokenwise().items()} == {
        name: x.tolist() for name, x in many.tokenwise().items()
    }
    assert one.columns == many.columns
    assert len({tuple(rewards) for rewards in one.columns["turn_rewards"]}) > 2


class Breaks(Talks):
    """Fails where the row says: at the beginning, or in a turn."""

    def reset(self, row: dict[str, Any]) -> list[dict[str, str]]:
        self.fails = row["fails"]
        if self.fails == 0:
            raise ConnectionError("no free place")
        return super().reset(row)

    def step(self, text: str) -> tuple[list[dict[str, str]], float | None, bool]:
        answer = super().step(text)
        if self.turns == self.fails:
            raise TimeoutError("no answer")
        return answer


@pytest.mark.parametrize("workers", [1, 3])
def test_who_fails_ends_a_completion_and_not_the_run(workers: int) -> None:
    """At the beginning, in the first turn, in the second, and never; each has at least a turn of the policy."""
    prompts = Prompts.of(make_prompts((3, 2, 4, 1)) | {"columns": {"fails": [0, 1, 2, 9]}})
    engine = Turns(Breaks, max_turns=3, engine=Scripted(), workers=workers)
    with pytest.warns(UserWarning, match="it raised") as warned:
        rollout = engine.generate(make_policy(), Distribution(), prompts)
    assert rollout.lengths.tolist() == [2, 2, 2 + 2 + 3, 2 + 2 + 3 + 2 + 4]
    assert rollout.columns["returns"] == [None, None, None, 3.0]
    assert rollout.columns["turn_rewards"] == [None, None, None, [1.0, 2.0, 0.0]]
    said = [str(one.message) for one in warned]
    assert [text.count("no free place") for text in said] == [1, 0, 0]
    assert sum("no answer" in text for text in said) == 2


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("when", [0, 1])
def test_where_all_fail_the_run_ends(when: int, workers: int) -> None:
    prompts = Prompts.of(make_prompts() | {"columns": {"fails": [when] * 3}})
    with pytest.raises(InputError, match=r"^environment Breaks: it raised \w+: no \w+") as raised:
        Turns(Breaks, engine=Scripted(), workers=workers).generate(make_policy(), Distribution(), prompts)
    assert isinstance(raised.value.__cause__, OSError)


def test_a_number_of_workers() -> None:
    with pytest.raises(InputError, match="workers"):
        Turns(Talks, workers=0)


class Closing(Breaks):
    """Counts how often it is closed, and has a last reward, a hundred; where the row says so, it cannot be closed."""

    closed: ClassVar[list[int]] = []

    def close(self) -> float | None:
        self.closed.append(self.fails)
        if self.fails == 7:
            raise OSError("still in use")
        return 100.0


@pytest.mark.parametrize("workers", [1, 3])
def test_each_conversation_is_closed_once_and_may_have_a_last_reward(
    workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever ended it: the environment, a fault at the beginning or in a turn, the number of turns, of tokens."""
    monkeypatch.setattr(Closing, "closed", [])
    columns = {"fails": [0, 1, 7, 9], "last": [9, 9, 9, 1]}
    prompts = Prompts.of(make_prompts((3, 2, 4, 1)) | {"columns": columns})
    engine = Turns(Closing, max_turns=3, engine=Scripted(), workers=workers)
    with pytest.warns(UserWarning, match="it raised") as warned:
        rollout = engine.generate(make_policy(), Distribution(), prompts)
    assert sorted(Closing.closed) == [0, 1, 7, 9]
    assert rollout.columns["returns"] == [None, None, None, 101.0]
    assert len(warned) == 3
    assert "still in use" in str(warned[-1].message)
    few = Turns(Closing, max_turns=3, engine=Scripted(), workers=workers)
    limits = Prompts.of(make_prompts((3,)) | {"columns": {"fails": [9], "last": [9]}})
    assert few.generate(make_policy(), Distribution(4), limits).columns["turn_rewards"] == [[101.0]]
    whole = Turns(Closing, max_turns=3, engine=Scripted(), workers=workers)
    assert whole.generate(make_policy(), Distribution(), limits).columns["turn_rewards"] == [[1.0, 2.0, 100.0]]
