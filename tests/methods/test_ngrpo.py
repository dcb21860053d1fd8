"""NGRPO: its base without virtual completions, groups that fail or are solved, and a reward above the best."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from grade_lightning.methods import DAPO, NGRPO
from grade_lightning.modules import PolicyGradientModule
from grade_lightning.records import Rollout
from grade_lightning.rewards import Reward
from grade_lightning.selection import Selection
from tests.methods.toy_task import Toy, assert_same
from tests.modules.toys import Watch, build, distance, gradient, plain, prompts, run

pytestmark = pytest.mark.usefixtures("own_random_state")


class Given(Reward):
    """The same for all completions of a prompt; of the last prompt Toy's."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.values = values

    def forward(self, rollout: Rollout) -> Tensor:
        toy = Toy().score(rollout).total
        given = torch.tensor([*self.values, torch.nan])[rollout.columns["kind"]]
        return torch.where(given.isnan(), toy, given)


def kinds(count: int) -> dict[str, Any]:
    """Prompts that are numbered, the completions of each prompt by it."""
    batch = prompts(count)
    batch["columns"]["kind"] = list(range(count))
    return batch


def two_windows(method: type[PolicyGradientModule], **kwargs: Any) -> Watch:
    settings = plain(method, epochs=2, minibatches=2, **kwargs)
    return run(build(method, **settings), prompts(4), prompts(4, seed=1))


@pytest.mark.slow
def test_without_virtual_completions_it_is_dapo_without_its_sampling_and_its_penalty() -> None:
    """Bit for bit, over two windows of four steps."""
    bounds = {"epsilon_low": 0.16, "epsilon_high": 0.24}
    base = two_windows(DAPO, overlong_buffer=0, **bounds)
    for settings in ({"virtual": 0}, {"virtual": 0, "selection": Selection()}):
        found = two_windows(NGRPO, **settings)
        assert len(found.gradients) == len(base.gradients) == 8
        for ours, truth in zip(found.gradients, base.gradients, strict=True):
            assert_same(ours, truth)
    assert distance(two_windows(NGRPO).gradients[0], base.gradients[0]) > 1e-3


def test_a_group_that_fails_has_a_negative_advantage_and_a_solved_one_none() -> None:
    module = build(NGRPO, **plain(NGRPO, reward=Given(0.0, 1.0), epochs=2))
    seen = module.collect(kinds(3))
    first = seen.advantages[:, 0]
    assert first[:4].tolist() == pytest.approx([-0.2 / (0.2**0.5 + 1e-4)] * 4)
    assert not first[4:8].any()
    assert not seen.sampled[4:8].any()
    assert seen.normalizers.tokens == seen.rollout.sampled[[0, 1, 2, 3, 8, 9, 10, 11]].sum()


@pytest.mark.parametrize("epochs", [1, 2])
def test_solved_groups_count_in_no_mean(epochs: int) -> None:
    """Three groups of which one is solved have the gradient of the other two; with all tokens, a smaller one."""
    settings = plain(NGRPO, reward=Given(0.0, 1.0), epochs=epochs)
    found = gradient(build(NGRPO, **settings), kinds(3))
    every = gradient(build(NGRPO, **settings, selection=Selection()), kinds(3))
    rollout = build(NGRPO, **settings).collect(kinds(3)).rollout
    share = float(rollout.sampled[[0, 1, 2, 3, 8, 9, 10, 11]].sum() / rollout.sampled.sum())
    assert 0.5 < share < 0.8
    assert distance(every, {name: share * value for name, value in found.items()}) < 1e-6


@pytest.mark.parametrize(("best", "copies", "warned"), [(0.3, 1, 1), (1.0, 1, 0), (0.3, 0, 0)])
def test_a_reward_above_the_best_is_warned_of_once(best: float, copies: int, warned: int) -> None:
    module = build(NGRPO, **plain(NGRPO, best=best, virtual=copies))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        run(module, prompts(4), prompts(4, seed=1))
    about = [str(warning.message) for warning in found if "best = " in str(warning.message)]
    assert len(about) == warned
    assert all("set best to the reward's maximum" in text for text in about)
