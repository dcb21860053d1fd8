"""DRPO's weights: sums, temperatures, groups of one kind, and the gradient of the objective as the paper writes it."""

import math

import pytest
import torch

from grade_lightning.functional.aggregation import Normalizers, group_sum
from grade_lightning.functional.decoupled import decoupled, hardness
from grade_lightning.functional.losses import policy_loss
from grade_lightning.functional.ratios import token_level

NAN = float("nan")
REWARDS = torch.tensor([[1.0, 0.0, 0.6, 0.4, NAN], [0.9, 0.1, 0.0, 0.2, 0.3]], dtype=torch.float64)
LENGTHS = torch.tensor([[3.0, 2.0, 6.0, 1.0, 6.0], [5.0, 4.0, 3.0, 6.0, 2.0]], dtype=torch.float64)


def test_right_ones_sum_to_one_and_wrong_ones_to_minus_one() -> None:
    found = decoupled(REWARDS, LENGTHS, longest=6)
    wrong = REWARDS < 0.5
    assert found.clamp(min=0).sum(-1).tolist() == pytest.approx([1, 1], rel=1e-12)
    weighed = found * hardness(torch.randn(2, 5, dtype=torch.float64), wrong)
    assert weighed.clamp(max=0).sum(-1).tolist() == pytest.approx([-1, -1], rel=1e-12)
    expected = [math.exp(0.5 / 0.1), math.exp(0.0)]
    assert found[0, [0, 2]].tolist() == pytest.approx([x / sum(expected) for x in expected], rel=1e-12)
    assert found[0, 4] == 0


def test_infinite_temperatures_weigh_all_the_same() -> None:
    found = decoupled(REWARDS, LENGTHS, 6, temperature=math.inf) * hardness(LENGTHS, REWARDS < 0.5, math.inf)
    assert found.tolist() == [[0.5, -0.5, 0.5, -0.5, 0.0], [1.0, -0.25, -0.25, -0.25, -0.25]]


@pytest.mark.parametrize("value", [0.0, 1.0, NAN])
def test_groups_of_one_kind_have_no_advantage(value: float) -> None:
    assert not decoupled(torch.full((1, 4), value), torch.ones(1, 4), 6).any()


@pytest.mark.parametrize("temperature", [0.3, 10.0])
def test_the_line_has_the_gradient_of_the_papers_objective(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(6) < LENGTHS.flatten().unsqueeze(1)
    logps = (-torch.rand(10, 6, dtype=torch.float64, generator=generator)).requires_grad_()
    scores = ((logps * mask).sum(-1) / mask.sum(-1)).view(2, 5)
    wrong, omega = REWARDS < 0.5, decoupled(REWARDS, LENGTHS, 6).clamp(min=0)
    loss = torch.zeros((), dtype=torch.float64)
    for row in range(2):
        bad = scores[row][wrong[row]]
        hard = temperature * ((bad / temperature).logsumexp(0) - math.log(len(bad)))
        loss = loss + (hard - (omega[row] * scores[row]).sum()) / 2
    (truth,) = torch.autograd.grad(loss, logps, retain_graph=True)

    table = decoupled(REWARDS, LENGTHS, 6)
    weights = group_sum(mask, Normalizers(tokens=float(mask.sum()), sequences=10), size=5).double()
    gate = hardness(scores.detach(), wrong, temperature).view(10, 1).expand(10, 6)
    advantages = table.view(10, 1).expand(10, 6)
    line = policy_loss(logps, logps.detach(), advantages, mask, weights, lambda *_: gate, token_level)
    (found,) = torch.autograd.grad(line, logps)
    assert float(truth.norm()) > 0.1
    torch.testing.assert_close(found, truth, rtol=1e-6, atol=1e-8)  # the weights are float32
