"""Weights that are moved along a random direction for a while, and the gradient that comes of it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from grade_lightning.functional.zeroth_order import direction
from grade_lightning.numerics import hash_seed


@contextmanager
def moved(parameters: Sequence[nn.Parameter], seed: int, by: float, copies: bool = False) -> Iterator[None]:
    """Add `by` times the direction of a seed to the weights, in place, and take it off again.

    Args:
        parameters: the weights.
        seed: of the direction, which is drawn anew each time it is needed and kept nowhere.
        by: ε or −ε.
        copies: restore the weights from copies, to the bit; else they are restored up to rounding.

    Example:
        >>> weight = nn.Parameter(torch.zeros(2))
        >>> with moved([weight], seed=1, by=1.0):
        ...     away = float(weight.norm())
        >>> away > 0, float(weight.norm())
        (True, 0.0)
    """
    kept = [p.detach().clone() for p in parameters] if copies else None
    _add(parameters, seed, by)
    try:
        yield
    finally:
        if kept is None:
            _add(parameters, seed, -by)
        else:
            with torch.no_grad():
                for parameter, value in zip(parameters, kept, strict=True):
                    parameter.copy_(value)


@torch.no_grad()
def _add(parameters: Sequence[nn.Parameter], seed: int, by: float) -> None:
    for index, parameter in enumerate(parameters):
        parameter.add_(direction(parameter, hash_seed(seed, index)), alpha=by)


class Estimate(torch.autograd.Function):
    """A scalar 0 whose gradient is Σ_k c_k z_k, z_k the directions of seeds."""

    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, seeds: Sequence[int], *parameters: Tensor) -> Tensor:
        """Coefficients (k,) of k directions in the space of the parameters."""
        ctx.coefficients, ctx.seeds, ctx.like = coefficients, seeds, [p.detach() for p in parameters]
        return coefficients.new_zeros(())

    @staticmethod
    def backward(ctx: Any, arrived: Tensor) -> Any:
        """Directions are drawn one after another; there is never more than one beside the gradient of a parameter."""
        gradients = []
        for index, like in enumerate(ctx.like):
            gradient = torch.zeros_like(like)
            for coefficient, seed in zip(ctx.coefficients, ctx.seeds, strict=True):
                gradient += (arrived * coefficient).to(like.dtype) * direction(like, hash_seed(seed, index))
            gradients.append(gradient)
        return None, None, *gradients
