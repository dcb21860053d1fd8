"""Bounds by probability: the reference's table, their definition, and extremes."""

import torch

from grade_lightning.functional.gates import clipped
from grade_lightning.functional.probability_bounds import probability_bounds


def test_the_table_of_the_reference() -> None:
    q = torch.tensor([[0.9, 0.01]], dtype=torch.float64)
    low, high = probability_bounds(q.log(), 0.16, 0.2)
    expected = torch.tensor([[0.7687, 0.5], [1.1872, 5.0]], dtype=torch.float64)
    torch.testing.assert_close(torch.cat([low, high]), expected, rtol=0, atol=5e-5)
    torch.testing.assert_close(high[0, 1], torch.tensor(5.0, dtype=torch.float64), rtol=1e-12, atol=0)


def test_at_the_bounds_the_probability_has_moved_by_epsilon() -> None:
    """|(r − 1) r q| = ε, wherever there is such an r below and the cap is not reached above."""
    q = torch.linspace(0.7, 1, 7, dtype=torch.float64).unsqueeze(0)
    for bound, epsilon in zip(probability_bounds(q.log(), 0.16, 0.2), (0.16, 0.2), strict=True):
        moved = ((bound - 1) * bound * q).abs()
        torch.testing.assert_close(moved, torch.full_like(moved, epsilon), rtol=1e-10, atol=0)


def test_impossible_tokens_have_finite_bounds() -> None:
    low, high = probability_bounds(torch.tensor([[-1e4, -200.0, 0.0]]), 0.16, 0.2)
    assert low[0, :2].tolist() == [0.5, 0.5]
    assert high[0, :2].tolist() == [10, 10]


def test_the_clip_takes_a_bound_of_each_token() -> None:
    ratio, logps = torch.tensor([[1.3, 1.3]]), torch.tensor([[0.9, 0.01]]).log()
    low, high = probability_bounds(logps, 0.16, 0.2)
    assert clipped(ratio, torch.ones(1, 2), low, high).tolist() == [[0, ratio[0, 1].item()]]
    ratio = torch.tensor([[0.6, 0.6]])
    assert clipped(ratio, -torch.ones(1, 2), low, high).tolist() == [[0, ratio[0, 1].item()]]
