"""Down-sampling: every subset of a few values, candidates, ties, and shares."""

import itertools

import pytest
import torch

from grade_lightning.functional.downsampling import kept_count, max_variance_subset, top_share


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("count", [1, 3, 5, 8])
def test_no_subset_has_a_larger_variance(seed: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(8, dtype=torch.float64, generator=generator).exp() * (1 if seed % 2 else -1)
    found = max_variance_subset(values, count)
    assert int(found.sum()) == count
    best = max(float(values[list(some)].var(unbiased=False)) for some in itertools.combinations(range(8), count))
    assert float(values[found].var(unbiased=False)) == pytest.approx(best, rel=1e-9, abs=1e-12)


def test_those_that_may_not_be_chosen_are_as_if_they_were_not_there() -> None:
    values = torch.tensor([9.0, 0.1, -9.0, 0.2, 0.9, 0.0, float("nan")], dtype=torch.float64)
    candidates = torch.tensor([False, True, False, True, True, True, False])
    for count in range(1, 7):
        found = max_variance_subset(values, count, candidates)
        assert int(found.sum()) == min(count, 4)
        assert torch.equal(found[candidates], max_variance_subset(values[candidates], count))
    assert not max_variance_subset(values, 3, torch.zeros(7, dtype=torch.bool)).any()


@pytest.mark.parametrize("count", [1, 2, 4])
def test_among_equals_there_are_as_many(count: int) -> None:
    assert int(max_variance_subset(torch.zeros(4), count).sum()) == count


@pytest.mark.parametrize(("share", "expected"), [(1.0, 5), (0.6, 3), (0.5, 3), (0.2, 1), (0.01, 1)])
def test_the_highest_scores_among_the_candidates(share: float, expected: int) -> None:
    scores = torch.tensor([[5.0, 1.0, 9.0], [2.0, 4.0, 3.0]])
    candidates = torch.tensor([[True, True, False], [True, True, True]])
    found = top_share(scores, share, candidates)
    assert sorted(scores[found].tolist(), reverse=True) == [5.0, 4.0, 3.0, 2.0, 1.0][:expected]
    assert not top_share(scores, share, candidates & False).any()


def test_shares_of_ten_are_not_rounded_up_by_binary_numbers() -> None:
    assert [kept_count(10, i / 10) for i in range(1, 11)] == list(range(1, 11))
    scores, every = torch.arange(10.0).unsqueeze(0), torch.ones(1, 10, dtype=torch.bool)
    assert [int(top_share(scores, i / 10, every).sum()) for i in range(1, 11)] == list(range(1, 11))
