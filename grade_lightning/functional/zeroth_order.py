"""Gradients from values alone: a slope along a random direction, times the direction."""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def direction(like: Tensor, seed: int) -> Tensor:
    """Z ~ N(0, I) of the shape, type and device of a tensor; the same for the same seed.

    Example:
        >>> bool((direction(torch.zeros(3), 7) == direction(torch.ones(3), 7)).all())
        True
    """
    generator = torch.Generator(like.device).manual_seed(seed)
    return torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=generator)


def slope_sums(plus: Float[Tensor, "k b"], minus: Float[Tensor, "k b"], epsilon: float) -> Float[Tensor, "k 2"]:
    """Of each direction the sum of (f(w + εz) − f(w − εz)) / 2ε over its rows, and how many rows have both values.

    If f is linear around w their mean is d = z·∇f, and E[d z] = ∇f, E|d z|² = (n + 2) |∇f|² with n weights:
    unbiased, and as noisy as there are weights.

    Args:
        plus: f at w + εz, of each row with its own noise; NaN where there is no value.
        minus: f at w − εz, with the same noise.
        epsilon: ε.

    References:
        | Fine-Tuning Language Models with Just Forward Passes (Malladi et al., 2023), https://arxiv.org/abs/2305.17333

    Example:
        >>> slope_sums(torch.tensor([[1.0, torch.nan]]), torch.tensor([[0.5, 0.0]]), epsilon=0.5)
        tensor([[0.5000, 1.0000]])
    """
    slopes = (plus - minus) / (2 * epsilon)
    known = ~(plus.isnan() | minus.isnan())
    return torch.stack([slopes.masked_fill(~known, 0).sum(-1), known.sum(-1).to(slopes.dtype)], -1)


def clipped(slopes: Float[Tensor, " k"], bound: Float[Tensor, ""]) -> Float[Tensor, " k"]:
    """Slopes cut to ±bound; one that is not finite stays as it is, so that its step is left out.

    Clipping shortens and turns nothing: E[clip(d) z] = :func:`shrinkage` · ∇f.

    References:
        | Fine-tuning Quantized Neural Networks with Zeroth-order Optimization (Shang et al., 2025),
          https://arxiv.org/abs/2505.13430

    Example:
        >>> clipped(torch.tensor([3.0, -0.5, torch.inf]), torch.tensor(1.0))
        tensor([ 1.0000, -0.5000,     inf])
    """
    return torch.where(slopes.isfinite(), slopes.clamp(-bound, bound), slopes)


def shrinkage(bound: float, norm: float) -> float:
    """By what a clipped estimate is shorter than the gradient, on average: erf(C / √2 |∇f|).

    Args:
        bound: C.
        norm: |∇f|.

    Example:
        >>> round(shrinkage(1.0, 1.0), 3)
        0.683
    """
    return math.erf(bound / (math.sqrt(2) * norm))
