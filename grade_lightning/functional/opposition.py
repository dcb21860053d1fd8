"""Which gradients oppose each other.

Letters in shapes: p groups of rows, each with a gradient.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Opposition(NamedTuple):
    """What a Gram matrix says of opposing signals."""

    share: float
    """Of the pairs, those whose cosine is below the limit."""
    pair: tuple[int, int]
    """The two that oppose each other most."""
    cosine: float
    """Theirs."""
    ratio: float
    """|Σ g|² / Σ |g|²: p if all are equal, 1 if they are orthogonal, 0 if they cancel."""
    sides: tuple[list[int], list[int]]
    """The extreme ones on both sides of the direction in which they differ most."""
    weight: float
    """The part of Σ |g|² that belongs to these."""


def opposition(products: Float[Tensor, "p p"], limit: float = -0.5, extremes: int = 2) -> Opposition:
    """Find opposing groups of gradients.

    Args:
        products: Gram matrix of at least two gradients.
        limit: below which a cosine counts as opposing.
        extremes: how many to give of each side.

    References:
        | Outliers with Opposing Signals Have an Outsized Effect on Neural Network Optimization (Rosenfeld and Risteski,
          2023), https://arxiv.org/abs/2311.04163; they look at changes of the loss, of which policy gradients have none

    Example:
        >>> found = opposition(torch.tensor([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]), extremes=1)
        >>> found.pair, found.cosine, round(found.share, 2), round(found.ratio, 2)
        ((0, 1), -1.0, 0.33, 0.33)
    """
    size, squares = len(products), products.diagonal()
    norms = squares.clamp(min=0).sqrt()
    scales = norms.unsqueeze(1) * norms
    cosines = torch.where(scales > 0, products / scales, 0.0)  # a gradient of zero goes nowhere
    first, second = torch.triu_indices(size, size, 1, device=products.device)
    pairs = cosines[first, second]
    least = int(pairs.argmin())
    total = float(squares.sum())
    centred = products - products.mean(0) - products.mean(1, keepdim=True) + products.mean()
    direction = torch.linalg.eigh((centred + centred.T) / 2).eigenvectors[:, -1]
    order = direction.argsort().tolist()
    extremes = min(extremes, size // 2)
    sides = order[:extremes], order[-extremes:]
    weight = float(squares[sides[0] + sides[1]].sum())
    return Opposition(
        share=float((pairs < limit).double().mean()),
        pair=(int(first[least]), int(second[least])),
        cosine=float(pairs[least]),
        ratio=float(products.sum()) / total if total else 0.0,
        sides=sides,
        weight=weight / total if total else 0.0,
    )
