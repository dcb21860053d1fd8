"""Preference losses: their values by hand, their gradients, and what they do far from where they want to be."""

import math

import pytest
import torch
from torch import Tensor

from grade_lightning.functional.preferences import (
    apo_zero_unpaired,
    bradley_terry,
    centring,
    cpl,
    dpo,
    ipo,
    kto,
    online_ipo,
)
from grade_lightning.methods import DPO, IPO
from grade_lightning.records import TokenStats

MARGINS = [-30.0, -2.0, -0.1, 0.0, 0.1, 2.0, 30.0]


def pair(margin: float) -> tuple[Tensor, Tensor]:
    """Log-ratios of a preferred and another completion, this much apart."""
    chosen = torch.tensor([0.7 + margin], dtype=torch.float64, requires_grad=True)
    return chosen, torch.tensor([0.7], dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2, 0.5])
@pytest.mark.parametrize("margin", MARGINS)
def test_dpo_is_a_cross_entropy(margin: float, label_smoothing: float) -> None:
    """Between the label, right with 1 − ε, and the probability σ(βΔ) that the policy gives it."""
    beta = 0.3
    chosen, rejected = pair(margin)
    loss = dpo(chosen, rejected, beta, label_smoothing)
    p = 1 / (1 + math.exp(-beta * margin))
    truth = -(1 - label_smoothing) * math.log(p) - label_smoothing * math.log(1 - p)
    assert loss.item() == pytest.approx(truth, abs=1e-12)
    up, down = torch.autograd.grad(loss.sum(), [chosen, rejected])
    assert up.item() == pytest.approx(beta * (p - (1 - label_smoothing)), abs=1e-12)
    assert down.item() == -up.item()


def test_dpo_where_policy_and_reference_are_the_same() -> None:
    """At the first step: log 2, and a gradient of ∓β/2."""
    chosen, rejected = pair(0.0)
    loss = dpo(chosen, rejected, beta=0.1)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-15)
    assert torch.autograd.grad(loss.sum(), chosen)[0].item() == pytest.approx(-0.05, abs=1e-15)


def test_smoothed_dpo_is_least_at_a_finite_margin() -> None:
    """At log((1 − ε) / ε) / β: a label that may be wrong is not worth any confidence."""
    chosen, rejected = pair(math.log(0.8 / 0.2) / 0.1)
    (slope,) = torch.autograd.grad(dpo(chosen, rejected, 0.1, label_smoothing=0.2).sum(), chosen)
    assert slope.item() == pytest.approx(0, abs=1e-15)


def test_dpo_of_huge_margins_is_finite_in_float32() -> None:
    """A straight line of slope β on the wrong side, 0 on the right one; nothing overflows."""
    chosen = torch.tensor([-1e5, 1e5], requires_grad=True)
    loss = dpo(chosen, torch.zeros(2), beta=0.1)
    torch.testing.assert_close(loss, torch.tensor([1e4, 0.0]))
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), chosen)[0], torch.tensor([-0.1, 0.0]))


@pytest.mark.parametrize("margin", MARGINS)
def test_ipo_is_a_square_around_a_finite_margin(margin: float) -> None:
    """(Δ − 1 / 2β)²; it pulls back a margin that is too large."""
    beta = 0.25
    chosen, rejected = pair(margin)
    loss = ipo(chosen, rejected, beta)
    assert loss.item() == pytest.approx((margin - 2.0) ** 2, abs=1e-12)
    up, down = torch.autograd.grad(loss.sum(), [chosen, rejected])
    assert up.item() == pytest.approx(2 * (margin - 2.0), abs=1e-12)
    assert down.item() == -up.item()


@pytest.mark.parametrize("margin", MARGINS)
def test_bradley_terry_is_a_cross_entropy_beyond_the_margin(margin: float) -> None:
    chosen, rejected = pair(margin)
    wanted = torch.tensor([0.5], dtype=torch.float64)
    loss = bradley_terry(chosen, rejected, wanted)
    p = 1 / (1 + math.exp(0.5 - margin))
    assert loss.item() == pytest.approx(-math.log(p), abs=1e-12)
    up, down = torch.autograd.grad(loss.sum(), [chosen, rejected])
    assert up.item() == pytest.approx(p - 1, abs=1e-12)
    assert down.item() == -up.item()


def test_centring_pulls_the_middle_of_a_pair_to_zero() -> None:
    chosen, rejected = pair(2.0)
    up, down = torch.autograd.grad(centring(chosen, rejected).sum(), [chosen, rejected])
    assert up.item() == down.item() == pytest.approx(2 * (2.7 + 0.7))
    assert not centring(chosen, -chosen).any()


def test_the_methods_sum_or_average_over_tokens() -> None:
    """DPO compares sums of a completion's log-ratios, IPO means over its own number of tokens."""
    mask = (torch.arange(4) < torch.tensor([[4], [2]]), torch.arange(4) < torch.tensor([[1], [3]]))
    chosen, rejected = (torch.randn(2, 4, generator=torch.Generator().manual_seed(i)) * m for i, m in enumerate(mask))
    sums, means = [], []
    for b, (length, other) in enumerate(((4, 1), (2, 3))):
        win, lose = float(chosen[b, :length].sum()), float(rejected[b, :other].sum())
        sums.append(math.log1p(math.exp(-0.3 * (win - lose))))
        means.append((win / length - lose / other - 1 / 0.6) ** 2)
    zero = torch.zeros(2, 4)
    up, down = ((TokenStats(zero, x, zero, zero, zero), m) for x, m in zip((chosen, rejected), mask, strict=True))
    torch.testing.assert_close(DPO(beta=0.3).pair_loss(up, down), torch.tensor(sums))
    torch.testing.assert_close(IPO(beta=0.3).pair_loss(up, down), torch.tensor(means))


BOTH = torch.tensor([True, False])


def test_kto_at_its_reference_point() -> None:
    """Half of each weight, the steepest slope, and none of it through z₀."""
    ratios = torch.full((2,), 3.0, dtype=torch.float64, requires_grad=True)
    point = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    loss = kto(ratios, BOTH, point, beta=0.3, desirable_weight=1.4, undesirable_weight=0.6)
    assert loss.tolist() == pytest.approx([0.7, 0.3])
    slopes, through = torch.autograd.grad(loss.sum(), [ratios, point], allow_unused=True)
    assert slopes.tolist() == pytest.approx([-0.3 * 0.25 * 1.4, 0.3 * 0.25 * 0.6])
    assert through is None


@pytest.mark.parametrize("gain", [-20.0, -1.0, 0.3, 20.0])
def test_kto_is_the_same_with_labels_and_gains_turned_around(gain: float) -> None:
    point = torch.tensor(1.0)
    ahead, behind = torch.full((2,), 1 + gain), torch.full((2,), 1 - gain)
    torch.testing.assert_close(kto(ahead, BOTH, point, 0.2), kto(behind, ~BOTH, point, 0.2))
    assert kto(ahead, BOTH, point, 0.2)[0].item() == pytest.approx(1 - 1 / (1 + math.exp(-0.2 * gain)), abs=1e-6)


def test_apo_zero_is_kto_around_nothing() -> None:
    ratios = torch.tensor([1.5, 1.5])
    sigma = 1 / (1 + math.exp(-0.3))
    assert apo_zero_unpaired(ratios, BOTH, beta=0.2).tolist() == pytest.approx([1 - sigma, sigma])
    torch.testing.assert_close(apo_zero_unpaired(ratios, BOTH, 0.2), kto(ratios, BOTH, torch.tensor(0.0), 0.2))


@pytest.mark.parametrize("margin", MARGINS)
def test_cpl_with_a_reference_and_without_bias_is_dpo(margin: float) -> None:
    chosen, rejected = pair(margin)
    assert cpl(chosen, rejected, alpha=0.3).item() == pytest.approx(dpo(chosen, rejected, 0.3).item(), abs=1e-15)


def test_the_bias_of_cpl_holds_back_the_rejected_score_alone() -> None:
    """Half of a score of −2 is −1: as likely as the preferred one, and half as steep."""
    chosen, rejected = (torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (-1.0, -2.0))
    loss = cpl(chosen, rejected, alpha=1.0, bias=0.5)
    assert loss.item() == pytest.approx(math.log(2))
    up, down = torch.autograd.grad(loss.sum(), [chosen, rejected])
    assert (up.item(), down.item()) == pytest.approx((-0.5, 0.25))


def test_online_ipo_is_a_mean_over_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    ratios, wins = (torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    pairs = [(i, j) for i in range(4) for j in range(i)]
    expected = sum(((ratios - wins / 0.3)[:, i] - (ratios - wins / 0.3)[:, j]) ** 2 for i, j in pairs) / 6
    torch.testing.assert_close(online_ipo(ratios, wins, beta=0.3), expected)


def test_online_ipo_of_two_completions_is_pulled_to_their_odds() -> None:
    """Of two, P(i ≻ j) − 1/2 is what P_i − P_j is; where both are as good, the log-ratios are pulled together."""
    ratios = torch.tensor([[1.2, 0.2], [1.0, -1.0]])
    even, ahead = torch.tensor([0.5, 0.5]), torch.tensor([0.65, 0.35])  # (1/2 + P) / 2 of P = 0.8
    loss = online_ipo(ratios, torch.stack([ahead, even]), beta=0.1)
    assert loss.tolist() == pytest.approx([(1.0 - 3.0) ** 2, 2.0**2])
