"""Completions in parts: what is drawn and scored together, and that a reward that waits is asked meanwhile."""

from collections.abc import Callable
from threading import Event
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from grade_lightning.errors import InputError
from grade_lightning.methods import RLOO
from grade_lightning.modules.drawing import draw_and_score
from grade_lightning.policies import Policy
from grade_lightning.records import Prompts, Rollout, Scores
from grade_lightning.rewards import FunctionReward, RemoteJudge, WeightedSum
from grade_lightning.rollouts import Distribution, Sampler, TransformersEngine
from tests.conftest import VOCABULARY, make_prompts, make_tokenizer
from tests.methods.toy_task import fit, make
from tests.modules.toys import Prescribed
from tests.rewards.serving import says, serving

PATIENCE = 60.0  # seconds; nothing waits for them unless it is wrong


class Recorded:
    """Draws and scores by the prompt's number, and writes down in which order."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def draw(self, prompts: Prompts, groups: Tensor) -> Rollout:
        rows = prompts.columns["row"]
        self.events.append(("drawn", rows))
        ids = torch.tensor(rows).unsqueeze(1) + torch.arange(2)
        logps = torch.zeros(ids.shape)
        return Rollout(
            prompts.ids, prompts.mask, ids, torch.ones_like(ids).bool(), logps, make_tokenizer(), prompts.columns, [0],
            groups=groups,
        )  # fmt: skip

    def begin(self, rollout: Rollout) -> Callable[[], Scores]:
        rows = rollout.columns["row"]
        self.events.append(("begun", rows))

        def finish() -> Scores:
            self.events.append(("had", rows))
            return Scores(torch.tensor(rows, dtype=torch.float), {})

        return finish


def prompts() -> Prompts:
    ids = torch.arange(10, 14).unsqueeze(1)
    return Prompts(ids, torch.ones_like(ids), {"row": [2, 3, 4, 5]})


@pytest.mark.parametrize("at_once", [None, 1, 3, 4, 100])
@pytest.mark.parametrize("scored", [1, 2, 4])
def test_each_completion_has_its_own_score_and_group(at_once: int | None, scored: int) -> None:
    counts, seen = torch.tensor([2, 1, 3, 2]), Recorded()
    found = draw_and_score(seen.draw, seen.begin, prompts(), counts, at_once, scored)
    rows = [2, 2, 3, 4, 4, 4, 5, 5]
    assert found.scores.total.tolist() == rows
    assert found.rollout.columns["row"] == rows
    assert found.rollout.completion_ids[:, 0].tolist() == rows
    assert found.rollout.groups.tolist() == [0, 0, 1, 2, 2, 2, 3, 3]
    drawn = [len(rows) for event, rows in seen.events if event == "drawn"]
    together = {None: [8], 1: [2, 1, 3, 2], 3: [3, 3, 2], 4: [3, 3, 2], 100: [8]}
    assert drawn == together[at_once]


def test_the_next_part_is_drawn_before_the_scores_of_the_last_are_had() -> None:
    seen = Recorded()
    draw_and_score(seen.draw, seen.begin, prompts(), torch.ones(4).long(), 2, 4)
    first, second = [2, 3], [4, 5]
    assert seen.events == [
        ("drawn", first), ("begun", first), ("drawn", second), ("had", first), ("begun", second), ("had", second),
    ]  # fmt: skip


class Counting(TransformersEngine):
    """Says when it draws for the second time."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn, self.twice = 0, Event()

    def generate(self, policy: Policy, distribution: Distribution, prompts: Prompts) -> Rollout:
        self.drawn += 1
        if self.drawn == 2:
            self.twice.set()
        return super().generate(policy, distribution, prompts)


@pytest.mark.parametrize("summed", [False, True])
def test_a_function_in_the_background_waits_while_completions_are_drawn(summed: bool) -> None:
    engine = Counting()

    def waiting(completions: list[str], **columns: Any) -> list[float]:
        assert engine.twice.wait(PATIENCE)
        return [float(len(text)) for text in completions]

    reward: Any = FunctionReward(waiting, background=True)
    reward = WeightedSum([reward]) if summed else reward
    module = make(RLOO, sampler=Sampler(max_new_tokens=4, engine=engine, at_once=8), num_generations=4)
    module.reward = reward
    seen = fit(module, 1)
    assert engine.drawn >= 2
    assert seen.steps[0]["train/reward"] > 0


def test_a_judge_behind_a_server_answers_while_completions_are_drawn() -> None:
    engine = Counting()

    def answer(request: Any, number: int) -> Any:
        assert number == 0 or engine.twice.wait(PATIENCE)  # the first is asked before there are completions
        return says("yes")

    with serving(answer) as served:
        module = make(RLOO, sampler=Sampler(max_new_tokens=4, engine=engine, at_once=8), num_generations=4)
        module.reward = RemoteJudge("m", served.url, output="answer", backoff=0.0, key_variable="JUDGE_TEST_KEY")
        module.reward.load(make_tokenizer(), VOCABULARY)
        assert fit(module, 1).steps[0]["train/reward"] == 1.0


def test_a_fault_in_the_background_ends_the_run_in_one_line() -> None:
    def broken(completions: list[str], **columns: Any) -> list[float]:
        raise ValueError("no such word")

    module = make(RLOO, sampler=Sampler(max_new_tokens=4, at_once=8), num_generations=4)
    module.reward = FunctionReward(broken, background=True)
    with pytest.raises(InputError, match=r"reward broken: the function raised ValueError: no such word"):
        fit(module, 1)


def test_parts_of_given_completions_are_trained_on_as_all_scored() -> None:
    ways = [[[4, 5], [12, 13, 14]], [[15], [3, 2]], [[17, 18], [18, 0]]]
    batch = make_prompts() | {"columns": {"completions": ways}}
    runs = []
    for at_once in (None, 2):
        sampler = Sampler(max_new_tokens=6, engine=Prescribed(), at_once=at_once)
        module = make(RLOO, sampler=sampler, num_generations=2)
        runs.append(fit(module, 2, DataLoader([batch] * 2, batch_size=None)).steps)  # type: ignore[arg-type]
    assert runs[0][0]["train/loss"] != 0
    for whole, parts in zip(*runs, strict=True):
        assert {name: parts[name] for name in ("train/loss", "train/reward", "train/kl")} == pytest.approx(
            {name: whole[name] for name in ("train/loss", "train/reward", "train/kl")}, rel=1e-5, abs=1e-6
        )


def test_a_at_once_of_none_at_all() -> None:
    with pytest.raises(InputError, match="at_once"):
        Sampler(at_once=0)
