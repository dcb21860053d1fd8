"""The sampler: its arguments, and what it hands to its engine."""

from typing import Any

import pytest
import torch

from grade_lightning.errors import InputError
from grade_lightning.policies import Policy
from grade_lightning.records import Prompts, Rollout
from grade_lightning.rollouts import Distribution, Engine, Sampler
from tests.conftest import make_prompts
from tests.rollouts.rolling import make_policy, roll


def test_columns_are_passed_on() -> None:
    columns = {"label": [1, 0, 1]}
    prompts = Prompts.of(make_prompts() | {"columns": columns})
    assert Sampler(max_new_tokens=2)(make_policy(), prompts).columns == columns


class Scripted(Engine):
    """Says the same token once, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def sync(self, policy: Policy, step: int) -> None:
        self.asked.append((policy, step))

    def generate(self, policy: Policy, distribution: Distribution, prompts: Prompts) -> Rollout:
        self.asked.append((policy, distribution, prompts))
        tokens = torch.full((len(prompts), 1), 5)
        logps = torch.full((len(prompts), 1), -1.0)
        return Rollout(prompts.ids, prompts.mask, tokens, tokens > 0, logps, policy.tokenizer, prompts.columns)


def test_the_engine_is_handed_the_weights_and_then_the_prompts() -> None:
    policy, engine, prompts = make_policy(), Scripted(), Prompts.of(make_prompts())
    sampler = Sampler(max_new_tokens=7, min_new_tokens=2, temperature=0.5, top_k=3, top_p=0.9, engine=engine)
    rollout = sampler(policy, prompts, step=4)
    assert engine.asked == [(policy, 4), (policy, Distribution(7, 2, 0.5, 3, 0.9), prompts)]
    assert rollout.completion_ids.tolist() == [[5]] * 3
    assert rollout.groups.tolist() == [0, 1, 2]
    assert sampler.max_new_tokens == 7


def test_the_completions_of_a_prompt_are_labelled() -> None:
    rollout = Sampler(engine=Scripted())(make_policy(), Prompts.of(make_prompts()), torch.tensor([4, 2, 4]))
    assert rollout.groups.tolist() == [4, 2, 4]
    assert rollout.layout.row.tolist() == [1, 0, 1]


def test_the_seed_decides() -> None:
    policy = make_policy()
    assert torch.equal(roll(policy, 1).completion_ids, roll(policy, 1).completion_ids)
    assert not torch.equal(roll(policy, 1).completion_ids, roll(policy, 2).completion_ids)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"min_new_tokens": -1},
        {"min_new_tokens": 9, "max_new_tokens": 8},
        {"temperature": 0.0},
        {"temperature": -1.0},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"temperature": float("nan")},
    ],
    ids=str,
)
def test_arguments_that_cannot_work_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        Sampler(**wrong)
