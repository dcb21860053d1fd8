"""Dual ascent where the policy is known in closed form: a bandit of four arms."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from grade_lightning.functional.duals import ascended, scaled

REWARDS = torch.tensor([1.0, 0.3, -0.5, 0.8], dtype=torch.float64)
COSTS = torch.tensor([2.0, 0.1, 0.0, 1.0], dtype=torch.float64)


def best(multiplier: float, temperature: float = 0.5) -> Tensor:
    """What maximises E[R − λ c] plus entropy."""
    return ((REWARDS - multiplier * COSTS) / temperature).softmax(-1)


def settled(step: Callable[[float], float], start: float) -> float:
    for _ in range(2000):
        start = step(start)
    return start


@pytest.mark.parametrize("start", [0.0, 20.0])
def test_a_bound_is_reached_from_both_sides(start: float) -> None:
    bound = 0.6
    assert best(0.0) @ COSTS > bound + 0.1
    found = settled(lambda m: ascended(m, float(best(m) @ COSTS) - bound, 0.3), start)
    assert found > 0
    assert float(best(found) @ COSTS) == pytest.approx(bound, abs=1e-9)


def test_a_bound_with_room_costs_nothing() -> None:
    assert settled(lambda m: ascended(m, float(best(m) @ COSTS) - 1.9, 0.3), 5.0) == 0.0


def divergence(beta: float) -> float:
    """KL of what maximises E R − β KL, from equal shares."""
    if beta == 0:
        return math.log(4)
    policy = best(0.0, beta)
    return float(torch.special.xlogy(policy, policy * 4).sum())


def test_both_ways_find_the_beta_of_a_kl() -> None:
    target = 0.1
    found = [settled(lambda b: ascended(b, divergence(b) - target, 1.0), start) for start in (0.0, 9.0)]
    found += [settled(lambda b: scaled(b, divergence(b) / target), start) for start in (1e-3, 9.0)]
    assert found == pytest.approx([found[0]] * 4, rel=1e-6)
    assert divergence(found[0]) == pytest.approx(target, rel=1e-6)
