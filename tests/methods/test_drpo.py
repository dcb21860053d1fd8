"""DRPO: its base with every temperature infinite, the weights as the policy moves, whole groups, and the penalty."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from grade_lightning.advantages import grouped
from grade_lightning.functional.aggregation import group_sum
from grade_lightning.functional.gates import reinforce
from grade_lightning.gates import by_advantage
from grade_lightning.levels import token_level
from grade_lightning.methods import DRPO
from grade_lightning.modules import PolicyGradientModule
from tests.methods.toy_task import Toy, assert_same
from tests.modules.toys import Watch, build, distance, plain, prompts, run

pytestmark = pytest.mark.usefixtures("own_random_state")


def difference(rewards: Tensor) -> Tensor:
    """1 / the number of right ones, −1 / the number of wrong ones; (P, G)."""
    right, wrong = rewards >= 0.5, rewards < 0.5
    one, other = (side.sum(-1, keepdim=True) for side in (right, wrong))
    return torch.where(right, 1 / one, -1 / other).masked_fill((one == 0) | (other == 0), 0)


class Difference(PolicyGradientModule):
    """The mean of the right completions less that of the wrong ones."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(
            advantage=grouped(difference),
            level=token_level,
            gate=by_advantage(reinforce),
            aggregate=lambda mask, normalizers: group_sum(mask, normalizers, 4),
            clips=False,
            whole_groups=True,
            **kwargs,
        )


def two_windows(method: type[PolicyGradientModule], **kwargs: Any) -> Watch:
    settings = plain(method, epochs=2, minibatches=2, **kwargs)
    return run(build(method, torch.float32, **settings), prompts(4), prompts(4, seed=1))  # the rewards' own width


OFF = {"length_temperature": math.inf, "failure_temperature": math.inf, "drift_penalty": 0.0}


def test_without_its_weights_it_is_the_difference_of_means() -> None:
    """Bit for bit, over two windows of four steps."""
    base, found = two_windows(Difference), two_windows(DRPO, **OFF)
    assert len(found.gradients) == 8
    for ours, truth in zip(found.gradients, base.gradients, strict=True):
        assert_same(ours, truth)
    assert distance(two_windows(DRPO).gradients[0], base.gradients[0]) > 1e-2


def test_wrong_ones_are_weighed_by_the_policy_as_it_is() -> None:
    """In the second epoch: the objective of the paper by automatic differentiation, without an importance weight."""
    settings: dict[str, Any] = {"failure_temperature": 0.1, "drift_penalty": 0.0}
    module = build(DRPO, lr=0.3, **plain(DRPO, epochs=2, **settings))
    batch = prompts(4)
    seen = module.collect(batch)
    first = {name: p.detach().clone() for name, p in module.named_parameters()}
    with torch.no_grad():
        for parameter in module.policy.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    module.zero_grad()
    module.loss(seen).loss.backward()
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}

    module.zero_grad()
    mask = seen.rollout.sampled
    now = module.measure(seen.rollout).logps
    scores = ((now * mask).sum(-1) / mask.sum(-1)).view(4, 4)
    rewards = Toy().score(seen.rollout).total.view(4, 4)
    lengths = mask.sum(-1).double().view(4, 4)
    loss = torch.zeros((), dtype=torch.float64)
    for s, r, n in zip(scores, rewards, lengths, strict=True):
        right, wrong = r >= 0.5, r < 0.5
        if right.any() and wrong.any():
            omega = ((1 - n[right] / 12) / 0.1).softmax(-1)
            loss = loss - (omega * s[right]).sum() + 0.1 * (s[wrong] / 0.1).exp().mean().log()
    (loss / 4).backward()
    truth = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert any(not torch.equal(first[name], p) for name, p in module.named_parameters())
    assert distance(found, truth) < 1e-5


def test_the_penalty_is_that_of_the_mean_drift() -> None:
    """In the second step of a window; none in the first, nor within the slack."""
    batch = prompts(4)
    found = {}
    for name, penalty, slack in (("with", 50.0, 1e-4), ("without", 0.0, 0.0), ("slack", 50.0, 1e3)):
        found[name] = run(build(DRPO, lr=0.3, **plain(DRPO, epochs=2, drift_penalty=penalty, slack=slack)), batch)
    assert_same(found["with"].gradients[0], found["without"].gradients[0])
    for one, two in zip(found["slack"].gradients, found["without"].gradients, strict=True):
        assert_same(one, two)
    first, then = (line["train/drift"] for line in found["with"].logged)
    assert first == 0
    assert then > 1e-3

    module = build(DRPO, lr=0.3, **plain(DRPO, epochs=2))
    seen = module.collect(batch)
    module.load_state_dict(found["with"].before[1], strict=False)
    now = module.measure(seen.rollout).logps
    drift = (seen.old.logps - now)[seen.mask].mean()
    assert float(drift) == pytest.approx(then, rel=1e-4)
    module.zero_grad()
    (50 / 2 * (drift - 1e-4).clamp(min=0).square()).backward()
    truth = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    pairs = {name: found["with"].gradients[1][name] - found["without"].gradients[1][name] for name in truth}
    assert distance(pairs, truth) < 1e-3


def test_groups_are_not_torn_apart() -> None:
    assert build(DRPO).whole_groups
