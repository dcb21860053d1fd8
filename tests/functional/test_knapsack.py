"""The knapsack: the reference's numbers, every allocation of a small one, and that the budget is always spent."""

import itertools

import pytest
import torch

from grade_lightning.functional.knapsack import allocate, best_counts, expected_need, rollout_value

NAN = float("nan")


def rates(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_the_numbers_of_the_reference() -> None:
    assert best_counts(rates(0.05, 0.2, 0.5, 0.9), 32, 2, 128).tolist() == [10, 13, 7, 2]
    assert allocate(rates(0.05, 0.2, 0.5, 0.9), 32).tolist() == [10, 13, 7, 2]
    assert expected_need(rates(0.5, 0.1), most=1000).tolist() == pytest.approx([3.3219, 21.8543], abs=1e-4)
    assert float(expected_need(rates(0.01), most=1000)) == pytest.approx(229.1, abs=0.1)


@pytest.mark.parametrize("seed", range(5))
def test_no_allocation_is_worth_more(seed: int) -> None:
    p = torch.rand(4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    found = best_counts(p, 20, 2, 9)
    assert int(found.sum()) == 20
    every = [torch.tensor(x) for x in itertools.product(range(2, 10), repeat=4) if sum(x) == 20]
    best = max(float(rollout_value(p, counts).sum()) for counts in every)
    assert float(rollout_value(p, found).sum()) == pytest.approx(best, rel=1e-12)


def test_a_gain_is_the_difference_of_two_values() -> None:
    """So that what is maximised is the value."""
    p = rates(0.3, 0.6)
    for budget in range(4, 12):
        more, less = (best_counts(p, n, 2, 128) for n in (budget + 1, budget))
        assert int((more - less).sum()) == 1
        assert (more >= less).all()


@pytest.mark.parametrize(
    ("known", "budget", "expected"),
    [
        ((NAN, NAN, NAN), 24, [8, 8, 8]),
        ((1.0, 1.0, NAN), 24, [8, 8, 8]),  # nobody sometimes or never succeeds: all the same
        ((0.0, 1.0, 0.0), 24, [11, 2, 11]),
        ((0.0, 1.0, NAN), 25, [15, 2, 8]),
        ((0.5, 1.0, 0.0), 24, [6, 2, 16]),  # 18 are left, of which 3.3 are needed: 14 go to the failing one
        ((0.5, 1.0, 1.0), 24, [6, 9, 9]),
        ((0.5, 0.5), 16, [8, 8]),
        ((0.3, NAN), 300, [9, 291]),
        ((0.5, 0.5), 400, [200, 200]),  # beyond the most
    ],
)
def test_who_gets_what(known: tuple[float, ...], budget: int, expected: list[int]) -> None:
    assert allocate(rates(*known), budget).tolist() == expected


@pytest.mark.parametrize("seed", range(20))
def test_the_budget_is_always_spent(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    size = int(torch.randint(1, 12, (), generator=generator))
    kinds = torch.randint(4, (size,), generator=generator)
    p = torch.rand(size, dtype=torch.float64, generator=generator)
    p = torch.where(kinds == 0, 0.0, torch.where(kinds == 1, 1.0, torch.where(kinds == 2, NAN, p)))
    for share in (2, 3, 8, 200):
        counts = allocate(p, share * size)
        assert int(counts.sum()) == share * size
        assert int(counts.min()) >= 2
        assert (counts[p.isnan()] >= share).all()


def test_least_and_most_the_same_is_an_equal_share() -> None:
    assert allocate(rates(0.5, 0.0, 1.0, NAN), 32, least=8, most=8).tolist() == [8, 8, 8, 8]
