"""COPO: two lines against one by hand, GRPO without the second, and the mean reward of a prompt without the first."""

import math
from typing import Any

import pytest
import torch

from grade_lightning.functional.advantages import group_standardised
from grade_lightning.functional.consistency import consistent_reward, over_prompts
from grade_lightning.functional.gates import clipped
from grade_lightning.functional.losses import policy_loss
from grade_lightning.functional.ratios import token_level
from grade_lightning.methods import COPO, DAPO
from tests.modules.toys import build, plain, prompts, run

pytestmark = pytest.mark.usefixtures("own_random_state")


def first_word(completion: str) -> str:
    return str(ord(completion.split()[0][-1]) % 2) if completion.split() else ""


@pytest.mark.parametrize("steps", [{}, {"epochs": 2}, {"minibatches": 2}], ids=str)
def test_the_group_alone_is_grpo_bit_for_bit(steps: dict[str, Any]) -> None:
    """With a mean over tokens, which is DAPO without its own features."""
    one = run(build(COPO, **plain(COPO, threshold=-math.inf, dual=math.inf, **steps)), prompts(4))
    bare = plain(DAPO, epsilon_high=0.2, overlong_buffer=0, **steps)
    two = run(build(DAPO, **bare), prompts(4))
    for ours, truth in zip(one.gradients, two.gradients, strict=True):
        assert all(torch.equal(ours[name], truth[name]) for name in truth)


@pytest.mark.parametrize("forced", [False, True])
def test_both_advantages_by_hand(forced: bool) -> None:
    module = build(COPO, **plain(COPO, epochs=2, forced=forced, answer=first_word, threshold=0.7))
    seen = module.collect(prompts(4))
    rewards = seen.scores.total.unflatten(0, (-1, 4))
    texts = [first_word(text) for text in seen.rollout.completions]
    groups = [texts[i : i + 4] for i in range(0, 16, 4)]
    entropies = []
    for group in groups:
        shares = [group.count(a) / 4 for a in set(group)]
        entropies.append(-sum(p * math.log2(p) for p in shares))
    assert len({round(e, 3) for e in entropies}) > 1
    bits = torch.tensor(entropies, dtype=rewards.dtype)
    own = (5 * (bits - 0.7)).sigmoid().repeat_interleave(4).unsqueeze(1)
    others = over_prompts(consistent_reward(rewards, bits, torch.full((4,), 4.0).to(rewards)))
    expected = own * group_standardised(rewards).flatten().unsqueeze(1) * seen.mask
    torch.testing.assert_close(seen.advantages, expected.double(), rtol=1e-4, atol=1e-5)
    expected = (1 - own) * others.repeat_interleave(4).unsqueeze(1) * seen.mask
    torch.testing.assert_close(seen.extra["advantages"], expected.double(), rtol=1e-4, atol=1e-5)
    assert float(seen.metrics["answer_entropy"]) == pytest.approx(sum(entropies) / 4, rel=1e-5)


def test_a_group_of_equal_rewards_is_forced_to_the_other_prompts() -> None:
    module = build(COPO, **plain(COPO, epochs=2, forced=True))
    batch = prompts(4)
    batch["columns"]["completions"][0] = [[12, 13]] * 4
    seen = module.collect(batch)
    assert not seen.advantages[:4].any()
    free = build(COPO, **plain(COPO, epochs=2)).collect(batch)
    assert (seen.extra["advantages"][:4].abs() >= free.extra["advantages"][:4].abs()).all()
    assert seen.extra["advantages"][0, 0] != 0


def test_two_lines_are_one_of_weighed_coefficients() -> None:
    """W c(r, A₁) A₁ + (1 − w) c(r, A₂) A₂ before ∇log π, though the gate cuts either by its own sign."""
    generator = torch.Generator().manual_seed(0)
    old, noise, first, second = torch.randn(4, 6, 5, dtype=torch.float64, generator=generator)
    weight = torch.rand(6, 1, dtype=torch.float64, generator=generator)
    mask = torch.ones(6, 5, dtype=torch.bool)
    logps = (old + 0.4 * noise).requires_grad_()

    def gate(ratio: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
        return clipped(ratio, advantages, 0.8, 1.2, 3.0)

    def line(advantages: torch.Tensor) -> torch.Tensor:
        return policy_loss(logps, old, advantages, mask, mask.double() / 30, gate, token_level)

    (found,) = torch.autograd.grad(line(weight * first) + line((1 - weight) * second), logps)
    ratio = (logps - old).exp().detach()
    truth = weight * gate(ratio, first) * first + (1 - weight) * gate(ratio, second) * second
    assert torch.equal(found, -truth / 30) or (found + truth / 30).abs().max() < 1e-16
