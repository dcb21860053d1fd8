"""Sketches: inner products over seeds, against the formulas."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from grade_lightning.functional.moments import gram, moments, variance_components
from grade_lightning.functional.sketch import count_sketch
from tests.conftest import mostly_slow
from tests.functional.gaussians import MEAN, equal, normal


def sketches(vector: Tensor, buckets: int, seeds: int, **options: Any) -> Tensor:
    return torch.stack([count_sketch(vector, buckets, seed, **options) for seed in range(seeds)])


def test_each_component_goes_to_one_bucket_with_a_sign() -> None:
    """So the sketch is a linear map, and every cell of bucket and sign is as likely as another."""
    eye = torch.eye(400, dtype=torch.float64)
    matrix = torch.stack([count_sketch(row, 4, seed=0) for row in eye])
    assert (matrix.count_nonzero(1) == 1).all()
    assert (matrix.abs().sum(1) == 1).all()
    cells = torch.cat([(matrix == sign).sum(0) for sign in (-1, 1)])
    assert stats.chisquare(cells.numpy()).pvalue > 0.01
    vector = torch.randn(400, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    equal(count_sketch(vector, 4, seed=0), vector @ matrix)


def test_a_sketch_is_determined_by_its_seed() -> None:
    """And neither uses nor disturbs the global generator."""
    vector = torch.randn(100, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = count_sketch(vector, 16, seed=3)
    torch.manual_seed(2)
    assert torch.equal(count_sketch(vector, 16, seed=3), one)
    assert not torch.allclose(count_sketch(vector, 16, seed=4), one)
    torch.manual_seed(1)
    count_sketch(vector, 16, seed=5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("chunk", mostly_slow([2**20, 7], 7))
def test_inner_products_of_sketches_are_unbiased(chunk: int) -> None:
    """Over seeds, with the variance (|x|² |y|² + ⟨x, y⟩² − 2 Σ x² y²) / k; with as many chunks as there may be."""
    x, y = torch.randn(2, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = y + 0.5 * x
    k, seeds = 16, 2_000
    a, b = sketches(x, k, seeds, chunk=chunk), sketches(y, k, seeds, chunk=chunk)
    for one, two, u, v in ((a, b, x, y), (a, a, x, x)):
        found = (one * two).sum(1)
        variance = float(u @ u * (v @ v) + (u @ v) ** 2 - 2 * (u * u) @ (v * v)) / k
        assert abs(float(found.mean() - u @ v)) < 4 * math.sqrt(variance / seeds)
        assert float(found.var()) == pytest.approx(variance, rel=0.15)


@pytest.mark.parametrize("buckets", [8, 128])
def test_the_relative_deviation_is_about_the_root_of_two_over_the_buckets(buckets: int) -> None:
    vector = torch.randn(1_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = sketches(vector, buckets, 1_000).square().sum(1) / vector.square().sum()
    assert float(found.std()) == pytest.approx(math.sqrt(2 / buckets), rel=0.1)


@pytest.mark.parametrize("chunk", [1, 7, 99, 100, 101])
def test_the_size_of_a_chunk_does_not_matter(chunk: int) -> None:
    """On the CPU, where random integers come one after the other."""
    vector = torch.randn(100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    equal(count_sketch(vector, 16, seed=0, chunk=chunk), count_sketch(vector, 16, seed=0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_sketch_of_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    vector = torch.randn(5_000, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = count_sketch(vector, 4, seed=0)
    assert found.dtype == torch.float32
    equal(found, count_sketch(vector.float(), 4, seed=0), rtol=0, atol=0)
    equal(found.double(), count_sketch(vector.double(), 4, seed=0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("function", [moments, lambda products: variance_components(products, 4)])
def test_sketches_enter_in_place_of_the_vectors(function: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
    """With one seed for all draws, what is linear in inner products stays right on average over seeds."""
    draws = 0.2 * normal(4, 1, seed=0) + normal(4, 2, seed=1) + MEAN
    draws = draws.flatten(0, 1)
    found = [
        torch.stack(function(gram(torch.stack([count_sketch(draw, 8, seed) for draw in draws])))) for seed in range(250)
    ]
    off = torch.stack(found) - torch.stack(function(gram(draws)))
    assert (off.mean(0).abs() < 4 * off.std(0) / math.sqrt(250)).all()
