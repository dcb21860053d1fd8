"""Runs with shared prompts are those without: each loss, gradient and weight, to rounding."""

from typing import Any, cast

import pytest
import torch

from grade_lightning.distributed import Reduce
from grade_lightning.kl import KL
from grade_lightning.methods import GRPO, PPO, RLOO, GradeSTE
from grade_lightning.modules import PolicyGradientModule
from grade_lightning.modules.window import plan_steps
from grade_lightning.policies import Pass, SharedPrefixPass, WholePass
from grade_lightning.records import Batching, Experience, Rollout, Scores
from tests.conftest import make_tokenizer
from tests.modules.toys import Watch, build, distance, gradient, move, own_weights, prompts, run
from tests.policies.test_passes import Shapes, packed  # noqa: F401

pytestmark = pytest.mark.usefixtures("own_random_state")

RUNS: dict[str, tuple[type[PolicyGradientModule], dict[str, Any], int]] = {
    "RLOO": (RLOO, {"num_generations": 4, "kl": KL(0.1)}, 1),
    "GRPO": (GRPO, {"num_generations": 4, "epochs": 2, "minibatches": 2}, 1),
    "GRPO, accumulated": (GRPO, {"num_generations": 4, "epochs": 2}, 2),
    "PPO": (PPO, {"num_generations": 2, "epochs": 2}, 1),
}


def curve(name: str, training_pass: Pass) -> tuple[Watch, PolicyGradientModule]:
    """Two windows of four prompts with completions of 1 to 12 tokens."""
    method, settings, accumulate = RUNS[name]
    module = build(method, training_pass=training_pass, **settings)
    size = settings["num_generations"]
    watch = run(module, *(prompts(4, size, seed) for seed in range(2)), accumulate_grad_batches=accumulate)
    return watch, module


@pytest.mark.parametrize("name", RUNS)
def test_the_curves_are_the_same(name: str, packed: Shapes) -> None:  # noqa: F811
    whole, module = curve(name, WholePass())
    assert packed == []
    shared, other = curve(name, SharedPrefixPass())
    assert len(packed) > 2 * len(shared.gradients)  # policy and reference, and the check of the first batch
    assert len(shared.gradients) == len(whole.gradients) >= 2
    for ours, truth in zip(shared.gradients, whole.gradients, strict=True):
        assert distance(ours, truth) < 1e-9
    assert distance(own_weights(other), own_weights(module)) < 1e-9
    if "accumulated" in name:
        return  # what is logged is of a micro-batch, and these are others
    for line, expected in zip(shared.logged, whole.logged, strict=True):
        timeless = {key: value for key, value in expected.items() if "tok" not in key}
        assert {key: line[key] for key in timeless} == pytest.approx(timeless, rel=1e-5, abs=1e-6, nan_ok=True)


def test_grade_ste_without_hops_shares_them_too(packed: Shapes) -> None:  # noqa: F811
    found, method = [], cast(type[PolicyGradientModule], GradeSTE)
    for way in (WholePass(), SharedPrefixPass()):
        del packed[:]
        module = build(method, training_pass=way, num_generations=4, beta=0.1)
        move(module)
        found.append(gradient(module, prompts(4)))
        assert bool(packed) == isinstance(way, SharedPrefixPass)
    assert distance(*found) < 1e-9


def test_micro_batches_keep_neighbours_together() -> None:
    """Six prompts of four completions in three micro-batches of a step, the shortest prompts' first; none is torn."""
    lengths = torch.tensor([[1, 9, 2, 3], [5, 4, 4, 1], [12, 1, 1, 1], [2, 2, 2, 2], [3, 1, 1, 1], [7, 8, 6, 1]])
    plan = planned(lengths.flatten(), torch.arange(6).repeat_interleave(4), Batching("prompts", 4, accumulation=3))
    assert [rows.tolist() for rows, _ in plan] == [
        [12, 13, 14, 15, 16, 17, 18, 19],
        [4, 5, 6, 7, 20, 21, 22, 23],
        [0, 1, 2, 3, 8, 9, 10, 11],
    ]
    assert len({totals for _, totals in plan}) == 1


def test_neighbours_do_not_change_which_step_a_row_is_in() -> None:
    """Shuffled over two steps, in two micro-batches each: as many of a prompt stay together as the step has."""
    labels = torch.arange(6).repeat_interleave(4)
    lengths = torch.randperm(24, generator=torch.Generator().manual_seed(3)) + 1
    batching, found = Batching("prompts", 4, minibatches=2, accumulation=2), []
    for neighbours in (False, True):
        torch.manual_seed(7)
        found.append([rows for rows, _ in planned(lengths, labels, batching, neighbours)])
    for plain, near in zip(
        *([torch.cat(pair) for pair in zip(x[::2], x[1::2], strict=True)] for x in found), strict=True
    ):
        assert sorted(plain.tolist()) == sorted(near.tolist())
        changes = int((labels[near].diff() != 0).sum())
        assert changes == len(labels[near].unique()) - 1
        assert int((labels[plain].diff() != 0).sum()) > changes


def planned(lengths: torch.Tensor, labels: torch.Tensor, batching: Batching, neighbours: bool = True) -> Any:
    ids = torch.ones(len(lengths), int(lengths.max()), dtype=torch.long)
    mask = torch.arange(ids.shape[1]) < lengths.unsqueeze(1)
    rollout = Rollout(ids, ids, ids, mask, None, make_tokenizer(), groups=labels)
    seen = Experience(rollout, Scores(torch.zeros(len(lengths)), {}))
    return plan_steps(seen, batching, Reduce().mean, neighbours=neighbours)
