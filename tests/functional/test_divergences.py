"""The exact KL, its two cotangents, and the estimates of it from sampled tokens."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from grade_lightning.functional.divergences import (
    ESTIMATORS,
    categorical_kl,
    k1,
    k2,
    k3,
    kl_cotangent,
    kl_reference_cotangent,
    later,
)

PI = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
REF = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
RIGHT = [0.3719, -0.0153, -0.1724, -0.1843]  # gradient of KL(π‖r) at the logits of π, see `test_a_worked_example`


def test_kl_and_cotangents_equal_torch_and_autograd() -> None:
    torch.manual_seed(0)
    policy = torch.randn(3, 4, 7, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(3, 4, 7, dtype=torch.float64, requires_grad=True)
    truth = kl_divergence(Categorical(logits=policy), Categorical(logits=reference))
    to_policy, to_reference = torch.autograd.grad(truth.sum(), [policy, reference])
    p, q = policy.detach().log_softmax(-1), reference.detach().log_softmax(-1)
    kl = categorical_kl(p, q)
    torch.testing.assert_close(kl, truth.detach(), rtol=0, atol=1e-14)
    torch.testing.assert_close(kl_cotangent(p, q, kl), to_policy, rtol=0, atol=1e-14)
    torch.testing.assert_close(kl_reference_cotangent(p, q), to_reference, rtol=0, atol=1e-14)


def test_a_worked_example() -> None:
    """π = (0.4, 0.3, 0.2, 0.1) against r = (0.1, 0.2, 0.3, 0.4).

    The logs of the ratios are ln 4 = 1.3863, ln 1.5 = 0.4055, ln ⅔ = −0.4055 and ln ¼ = −1.3863, so
    KL = 0.4 · 1.3863 + 0.3 · 0.4055 − 0.2 · 0.4055 − 0.1 · 1.3863 = 0.3 · 1.3863 + 0.1 · 0.4055 = 0.4564.
    The gradient is π (log ratio − KL): 0.4 · 0.9299 = 0.3719, 0.3 · (−0.0510) = −0.0153,
    0.2 · (−0.8619) = −0.1724, 0.1 · (−1.8427) = −0.1843. At the reference's logits it is r − π.
    """
    p, q = torch.tensor([0.4, 0.3, 0.2, 0.1]).log(), torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    kl = categorical_kl(p, q)
    torch.testing.assert_close(kl, torch.tensor(0.4564), rtol=0, atol=5e-5)
    torch.testing.assert_close(
        kl_cotangent(p, q, kl), torch.tensor([0.3719, -0.0153, -0.1724, -0.1843]), rtol=0, atol=5e-5
    )
    torch.testing.assert_close(kl_reference_cotangent(p, q), torch.tensor([-0.3, -0.1, 0.1, 0.3]))


def test_kl_of_a_distribution_to_itself_is_exactly_zero() -> None:
    p = torch.randn(5, 11, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    kl = categorical_kl(p, p)
    assert (kl == 0).all()
    assert (kl_cotangent(p, p, kl) == 0).all()


# ---- estimates from sampled tokens ----------------------------------------------------------------------------------


def test_estimates_of_one_token() -> None:
    """π = ½, r = ¼: ln 2 = 0.6931, ln² 2 / 2 = 0.2402, ½ − 1 + ln 2 = 0.1931; of equal ones exactly 0."""
    d = torch.tensor(2.0, dtype=torch.float64).log()
    for estimate, value in ((k1, 0.6931), (k2, 0.2402), (k3, 0.1931)):
        assert estimate(d).item() == pytest.approx(value, abs=5e-5)
        assert estimate(torch.zeros(3)).tolist() == [0, 0, 0]
    assert list(ESTIMATORS.values()) == [k1, k2, k3]


def test_expectations_of_the_estimates() -> None:
    """k1 and k3 are the KL, 0.4564, on the average; k2 is 0.5216. Only k1 is negative for some tokens."""
    d = (PI / REF).log()
    assert (PI @ k1(d)).item() == pytest.approx(0.4564, abs=5e-5)
    torch.testing.assert_close(PI @ k3(d), categorical_kl(PI.log(), REF.log()), rtol=0, atol=1e-15)
    torch.testing.assert_close(PI @ k1(d), categorical_kl(PI.log(), REF.log()), rtol=0, atol=1e-15)
    assert (PI @ k2(d)).item() == pytest.approx(0.5216, abs=5e-5)
    assert [bool((estimate(d) < 0).any()) for estimate in (k1, k2, k3)] == [True, False, False]


def test_estimates_of_small_and_large_log_ratios() -> None:
    """In float32: near 0, k3 is d²/2 and not the rounding of 1 − 1; far away nothing is clamped."""
    tiny = torch.tensor([1e-4, -1e-4])
    torch.testing.assert_close(k3(tiny), torch.full((2,), 5e-9), rtol=1e-2, atol=0)
    assert (k3(torch.linspace(-1e-3, 1e-3, 101)) >= -1e-10).all()
    assert k3(torch.tensor(50.0)).item() == pytest.approx(49, rel=1e-6)
    assert k3(torch.tensor(-50.0)).item() == pytest.approx(5.184705e21, rel=1e-5)
    assert k2(torch.tensor(-50.0)).item() == 1250


def loss_gradient(estimate: Callable[[Tensor], Tensor]) -> Tensor:
    """Expected gradient at the logits of π when the estimate of a sampled token is differentiated."""
    logits = PI.log().requires_grad_()
    (found,) = torch.autograd.grad(PI @ estimate(logits.log_softmax(-1) - REF.log()), logits)
    return found


def reward_gradient(estimate: Callable[[Tensor], Tensor]) -> Tensor:
    """The same when the estimate is a constant that multiplies ∇log π."""
    logits = PI.log().requires_grad_()
    logps = logits.log_softmax(-1)
    (found,) = torch.autograd.grad((PI * estimate((PI / REF).log())) @ logps, logits)
    return found


def test_gradients_of_the_estimates_in_the_loss() -> None:
    """k1: nothing. k2: the KL's. k3: π − r, the forward KL's, with another sign at the second token."""
    torch.testing.assert_close(loss_gradient(k1), torch.zeros_like(PI), rtol=0, atol=1e-15)
    torch.testing.assert_close(loss_gradient(k2), torch.tensor(RIGHT, dtype=torch.float64), rtol=0, atol=5e-5)
    exact = kl_cotangent(PI.log(), REF.log(), categorical_kl(PI.log(), REF.log()))
    torch.testing.assert_close(loss_gradient(k2), exact, rtol=0, atol=1e-15)
    torch.testing.assert_close(loss_gradient(k3), PI - REF, rtol=0, atol=1e-15)
    assert loss_gradient(k3)[1] > 0 > loss_gradient(k2)[1]


def test_gradients_of_the_estimates_in_the_reward() -> None:
    """k1: the KL's. k3: the KL's less the forward KL's. k2: something else."""
    exact = kl_cotangent(PI.log(), REF.log(), categorical_kl(PI.log(), REF.log()))
    torch.testing.assert_close(reward_gradient(k1), exact, rtol=0, atol=1e-15)
    torch.testing.assert_close(reward_gradient(k3), exact - (PI - REF), rtol=0, atol=1e-15)
    assert (reward_gradient(k2) - exact).norm() > 0.1


@pytest.mark.parametrize("name", ESTIMATORS)
def test_in_reward_and_loss_it_is_the_gradient_of_the_expectation(name: str) -> None:
    """∇ Σ π k: the KL's for k1 and k3, for k2 that of E k2."""
    logits = PI.log().requires_grad_()
    pi = logits.softmax(-1)
    (truth,) = torch.autograd.grad(pi @ ESTIMATORS[name](pi.log() - REF.log()), logits)
    found = loss_gradient(ESTIMATORS[name]) + reward_gradient(ESTIMATORS[name])
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-14)
    exact = kl_cotangent(PI.log(), REF.log(), categorical_kl(PI.log(), REF.log()))
    assert torch.allclose(found, exact, rtol=0, atol=1e-14) == (name != "k2")


def test_later_against_a_loop() -> None:
    values = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    truth = torch.tensor([[sum(row[t + 1 :]) for t in range(6)] for row in values.tolist()], dtype=torch.float64)
    torch.testing.assert_close(later(values), truth, rtol=0, atol=1e-14)
