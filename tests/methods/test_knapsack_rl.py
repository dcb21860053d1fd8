"""Knapsack RL: its base with an equal share, groups of different sizes, and the bound of advantages."""

from typing import Any

import pytest
import torch
from torch import Tensor

from grade_lightning.methods import DAPO, KnapsackRL
from grade_lightning.records import Prompts, Rollout
from grade_lightning.rewards import Reward
from grade_lightning.rollouts import Sampler
from tests.conftest import make_prompts
from tests.methods.toy_task import assert_same
from tests.modules.toys import Numbered, build, plain, prompts, run, states

pytestmark = pytest.mark.usefixtures("own_random_state")


SHORT = 3  # tokens of the shortest prompt


class Alternating(Reward):
    """By prompt: always 0, now and then 1, always 1."""

    def forward(self, rollout: Rollout) -> Tensor:
        kinds = rollout.prompt_mask.sum(-1)
        sometimes = (torch.arange(len(kinds)) % 4 == 0).float()
        return torch.where(kinds == SHORT, 0.0, torch.where(kinds == SHORT + 1, sometimes, 1.0))


def test_with_an_equal_share_it_is_dapo_without_its_sampling_and_its_penalty() -> None:
    """Bit for bit, over two windows of four steps, also once the prompts are known."""
    windows = prompts(4), prompts(4, seed=1)
    base = run(build(DAPO, **plain(DAPO, epochs=2, minibatches=2, overlong_buffer=0)), *windows)
    share = {"min_rollouts": 4, "max_rollouts": 4}
    found = run(build(KnapsackRL, **plain(KnapsackRL, epochs=2, minibatches=2, **share)), *windows)
    assert len(found.gradients) == 8
    for ours, truth in zip(found.gradients, base.gradients, strict=True):
        assert_same(ours, truth)


def test_known_prompts_get_what_they_need_in_groups_of_different_sizes() -> None:
    """The first window gives each of three prompts eight completions, the second eight on average."""
    batch = make_prompts() | {"columns": {}}
    settings: dict[str, Any] = {"reward": Alternating(), "sampler": Sampler(4, engine=Numbered())}
    module = build(KnapsackRL, torch.float32, num_generations=8, minibatches=2, **settings)
    watch = run(module, batch)
    assert [len(rows) for rows in watch.rows] == [12, 12]
    assert sorted(states(module)["selection"]["values"][:, 1].tolist()) == [0, 0.25, 1]
    seen = module.collect(batch)
    sizes = seen.rollout.groups.bincount()
    kinds = make_prompts()["attention_mask"].sum(-1).argsort()
    assert sizes[kinds].tolist() == [11, 11, 2]  # of 18 further ones a rate of a quarter needs 8.004
    assert torch.equal(sizes, module.selection.allocate(Prompts.of(batch), 24))
    assert run(module, batch).logged[-1]["train/skipped_steps"] == 0


def test_an_advantage_is_held_within_its_bound() -> None:
    table = torch.zeros(1, 100)
    table[0, 0] = 1

    class One(Reward):
        def forward(self, rollout: Rollout) -> Tensor:
            return table[0, : len(rollout.ids)]

    batch = prompts(1, size=100)
    for bound, expected in ((5.0, 5.0), (100.0, 9.9)):
        module = build(KnapsackRL, **plain(KnapsackRL, num_generations=100, epochs=2, bound=bound, reward=One()))
        assert float(module.collect(batch).advantages.max()) == pytest.approx(expected, rel=1e-3)
