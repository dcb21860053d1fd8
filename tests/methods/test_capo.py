"""CAPO: its mask against the explicit last layer, and GRPO without it."""

import math

import pytest
import torch
from torch.func import hessian

from grade_lightning.kl import KL
from grade_lightning.methods import CAPO, GRPO
from tests.modules.toys import build, gradient, plain, prompts, run

pytestmark = pytest.mark.usefixtures("own_random_state")


@pytest.mark.parametrize("epochs", [1, 2])
def test_without_bounds_it_is_grpo_bit_for_bit(epochs: int) -> None:
    bounds = {"max_objective_change": math.inf, "max_policy_change": math.inf}
    one = run(build(CAPO, **plain(CAPO, **bounds, epochs=epochs)), prompts(4))
    two = run(build(GRPO, **plain(GRPO, kl=KL(), epochs=epochs)), prompts(4))
    assert one.logged[0]["train/kept_tokens"] == 1
    for ours, truth in zip(one.gradients, two.gradients, strict=True):
        assert all(torch.equal(ours[name], truth[name]) for name in truth)


def test_tokens_are_kept_by_the_change_that_their_step_makes_in_the_last_layer() -> None:
    """m_H of J = A π_a / π_a(old) along the step, m_F = ½ (v·u)², of each token by autograd over the head's weights."""
    settings = plain(CAPO, epochs=2, lr=0.05)
    bare = build(CAPO, **settings, max_objective_change=math.inf, max_policy_change=math.inf)
    seen = bare.collect(prompts(4))
    rollout, lr = seen.rollout, 0.05
    with torch.no_grad():
        hidden = bare.policy.training_pass.hidden(bare.policy, rollout)
    head = bare.policy.model.get_output_embeddings().weight.detach()
    objective, policy = torch.zeros(2, *seen.mask.shape, dtype=torch.float64)
    for i, t in seen.mask.nonzero()[:40].tolist():
        h, a, advantage = hidden[i, t], rollout.completion_ids[i, t], seen.advantages[i, t]
        start = head @ h
        probs = start.softmax(-1)
        v = torch.eye(len(head), dtype=torch.float64)[a] - probs
        u = advantage * v * (h @ h)

        def moved(step: torch.Tensor, start=start, a=a, u=u, advantage=advantage) -> torch.Tensor:  # type: ignore[no-untyped-def]
            change: torch.Tensor = advantage * ((start + step * u).log_softmax(-1)[a] - start.log_softmax(-1)[a]).exp()
            return change

        zero = torch.zeros((), dtype=torch.float64)
        objective[i, t] = lr * torch.func.grad(moved)(zero) + lr**2 / 2 * hessian(moved)(zero)
        policy[i, t] = lr**2 / 2 * (v @ u) ** 2
    first = seen.mask.nonzero()[:40].unbind(1)
    bounds = float(objective[first].abs().median()), float(policy[first].quantile(0.7))
    bounded = build(CAPO, **settings, max_objective_change=bounds[0], max_policy_change=bounds[1]).collect(prompts(4))
    assert bounded.kept is not None
    expected = (objective[first].abs() < bounds[0]) & (policy[first] < bounds[1])
    assert bounded.kept[first].tolist() == expected.tolist()
    assert 5 < expected.sum() < 35
    assert float(bounded.metrics["kept_tokens"]) == float(bounded.sampled.sum() / rollout.sampled.sum())


def test_it_is_the_rate_of_the_next_step_that_counts() -> None:
    """A schedule that falls opens the mask."""
    batch = prompts(4)
    loose, tight = (
        build(CAPO, **plain(CAPO, epochs=2), max_objective_change=1e-2, max_policy_change=math.inf, lr=lr).collect(
            batch
        )
        for lr in (1e-4, 1e-2)
    )
    assert float(tight.metrics["kept_tokens"]) < float(loose.metrics["kept_tokens"])


def test_what_is_left_out_has_no_gradient() -> None:
    module = build(CAPO, **plain(CAPO), max_objective_change=1e-300)
    assert not any(grad.any() for grad in gradient(module, prompts(4)).values())
