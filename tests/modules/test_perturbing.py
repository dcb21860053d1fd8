"""Weights moved along a direction and back, and the gradient that is made of directions."""

import pytest
import torch
from torch import nn

from grade_lightning.functional.zeroth_order import direction
from grade_lightning.modules.perturbing import Estimate, moved
from grade_lightning.numerics import hash_seed


def make(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((4, 3), (5,))]


@pytest.mark.parametrize("copies", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_restored(copies: bool, dtype: torch.dtype) -> None:
    """To the bit from copies; else up to a rounding, which in half precision is no small one."""
    weights, truth = make(dtype), make(dtype)
    with moved(weights, seed=3, by=0.01, copies=copies):
        for index, (p, before) in enumerate(zip(weights, truth, strict=True)):
            torch.testing.assert_close(p - before, 0.01 * direction(before, hash_seed(3, index)), atol=0.01, rtol=0.1)
            assert not torch.equal(p, before)
    gap = max(float((p - before).abs().max()) for p, before in zip(weights, truth, strict=True))
    assert gap == 0 if copies else gap <= 2 * torch.finfo(dtype).eps * 2.5
    assert copies or dtype is torch.float32 or gap > 0


def test_weights_are_restored_after_an_error() -> None:
    weights, truth = make(), make()
    with pytest.raises(RuntimeError), moved(weights, seed=1, by=1.0, copies=True):
        raise RuntimeError
    assert all(torch.equal(p, before) for p, before in zip(weights, truth, strict=True))


def test_the_gradient_is_the_sum_of_directions() -> None:
    weights = make(torch.float64)
    coefficients = torch.tensor([2.0, -0.5], dtype=torch.float64)
    (3 * Estimate.apply(coefficients, [11, 12], *weights)).backward()  # type: ignore[no-untyped-call]
    for index, p in enumerate(weights):
        first, second = (direction(p, hash_seed(seed, index)) for seed in (11, 12))
        assert p.grad is not None
        torch.testing.assert_close(p.grad, 6 * first - 1.5 * second)
