"""The exact KL and its two cotangents."""

import torch
from torch.distributions import Categorical, kl_divergence

from grade_lightning.functional.divergences import categorical_kl, kl_cotangent, kl_reference_cotangent


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
