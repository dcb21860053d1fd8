"""Widths and seeds."""

import math

import pytest
import torch

from grade_lightning.numerics import finite_or_none, hash_seed, wide_numbers, widened


@pytest.mark.parametrize(("dtype", "wide"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_numbers_are_float32_or_better(dtype: torch.dtype, wide: torch.dtype) -> None:
    assert widened(torch.ones(1, dtype=dtype)).dtype == wide
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with wide_numbers():
            assert torch.zeros(1).dtype == wide
            assert (torch.ones(1, dtype=torch.long) / 2).dtype == wide
        assert torch.get_default_dtype() == dtype
        with pytest.raises(ZeroDivisionError), wide_numbers():
            _ = 1 / 0
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(before)


def test_seeds_are_the_same_on_every_machine_and_differ_by_every_part() -> None:
    assert hash_seed(42, "train", 0, 0) == 5209735009535139542
    found = {hash_seed(*key) for key in [(1, 2), (2, 1), (1, 2, 0), ("1", 2), (12,), (1, "2")]}
    assert len(found) == 6
    assert all(0 <= seed < 2**63 for seed in found)


def test_json_has_no_number_for_infinity() -> None:
    assert [finite_or_none(x) for x in (1.5, math.inf, -math.inf, math.nan)] == [1.5, None, None, None]
