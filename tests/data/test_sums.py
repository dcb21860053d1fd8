"""The sums are different, as hard as they have carries, and wrong only by forgotten ones."""

import pytest

from grade_lightning.data import generate_sums


def _terms(row: dict[str, str]) -> list[int]:
    return [int(term) for term in row["prompt"].removesuffix("=").split("+")]


def test_who_remembers_all_carries_is_right() -> None:
    for row in generate_sums(500, seed=3, carries=1.0):
        terms = [term for term in _terms(row) if term]
        assert row["completion"].split("\n") == [str(sum(terms[: i + 1])) for i in range(1, len(terms))]
        assert row["answer"] == str(sum(terms))


def test_who_forgets_all_of_them_is_wrong_by_ten_for_each() -> None:
    for row in generate_sums(500, seed=3, carries=0.0):
        first, *others = _terms(row)
        carries = (first % 10 + sum(others)) // 10
        assert int(row["completion"].split("\n")[-1]) == int(row["answer"]) - 10 * carries


def test_carries_are_remembered_as_often_as_is_said() -> None:
    """A share of 0.25 of 2,000 single ones has a standard error of 0.01; seven of them are allowed."""
    single = [row for row in generate_sums(6_000, seed=3, carries=0.25) if _carries(row) == 1][:2_000]
    right = sum(row["completion"].endswith(row["answer"]) for row in single) / len(single)
    assert len(single) == 2_000
    assert abs(right - 0.25) < 0.07


def _carries(row: dict[str, str]) -> int:
    first, *others = _terms(row)
    return (first % 10 + sum(others)) // 10


def test_no_sum_is_there_twice_and_short_ones_are_spread() -> None:
    """567 have two terms: nearly all are there, and not all at the beginning."""
    rows = generate_sums(6_000, seed=3)
    assert len({row["prompt"] for row in rows}) == 6_000
    short = [i for i, row in enumerate(rows) if row["prompt"].endswith("+0+0=")]
    assert 500 < len(short) <= 567
    assert 2_000 < sum(short) / len(short) < 4_000
    assert {len(row["prompt"]) for row in rows} == {9}


def test_a_seed_is_a_set_of_sums() -> None:
    assert generate_sums(50, seed=3) == generate_sums(50, seed=3)
    assert generate_sums(50, seed=3) != generate_sums(50, seed=4)


def test_more_than_there_are() -> None:
    with pytest.raises(ValueError, match=r"51598 different sums: there are 51597"):
        generate_sums(51_598, seed=0)
