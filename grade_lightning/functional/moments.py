"""Moments of random gradients: how large the mean is, and how much they scatter.

A gradient is a vector g with mean G and covariance Σ. All that is asked here (|G|², tr Σ, their ratio, cosines) is
made of inner products between independent draws, so draws enter by their Gram matrix; draws may be sketches
(:mod:`.sketch`), whose inner products are right on average, and parts of a model add up: the Gram matrix of the whole
is the sum of those of its layers.

Ratios are ratios of averages: the average of ratios is biased without bound. The unbiased |G|² can come out at or
below zero; then the signal is *not resolved*, and what is divided by it is NaN.

Letters in shapes: n draws, d parameters, s settings that are averaged over.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Moments(NamedTuple):
    """Unbiased moments of a gradient."""

    squared_norm: Tensor
    """|G|² of the mean; may come out negative."""
    trace: Tensor
    """tr Σ, the sum of the variances of all components."""


def gram(vectors: Float[Tensor, "n d"]) -> Float[Tensor, "n n"]:
    """Inner products of all pairs, in float64.

    Example:
        >>> gram(torch.tensor([[1.0, 0.0], [1.0, 2.0]]))
        tensor([[1., 1.],
                [1., 5.]], dtype=torch.float64)
    """
    vectors = vectors.double()
    return vectors @ vectors.mT


def moments_from_norms(small: Float[Tensor, "*s"], big: Float[Tensor, "*s"], groups: int) -> Moments:
    """Moments of the gradient of one group, from the norms that are known when several groups are averaged.

    |G|² = (n |ḡ|² − mean |gᵢ|²) / (n − 1) and tr Σ = (mean |gᵢ|² − |ḡ|²) n / (n − 1).

    Args:
        small: mean of the *squared* norms of the groups' gradients.
        big: squared norm of their mean.
        groups: how many there are, n; the mean of n gradients has the covariance Σ / n.

    References:
        | An Empirical Model of Large-Batch Training (McCandlish et al., 2018), appendix A.1,
          https://arxiv.org/abs/1812.06162

    Example:
        >>> moments_from_norms(torch.tensor(3.0), torch.tensor(2.0), groups=2)  # (1, 0) and (1, 2): ḡ = (1, 1)
        Moments(squared_norm=tensor(1.), trace=tensor(2.))
    """
    if groups < 2:
        raise ValueError(f"groups = {groups}: one gradient says nothing about its scatter; 2 or more are needed")
    return Moments((groups * big - small) / (groups - 1), (small - big) * groups / (groups - 1))


def moments(products: Float[Tensor, "*s n n"]) -> Moments:
    """Moments of one draw, from the Gram matrix of n independent ones.

    Example:
        >>> moments(gram(torch.tensor([[1.0, 0.0], [1.0, 2.0]])))
        Moments(squared_norm=tensor(1., dtype=torch.float64), trace=tensor(2., dtype=torch.float64))
    """
    squares = products.diagonal(dim1=-2, dim2=-1).mean(-1)
    return moments_from_norms(squares, products.mean((-2, -1)), products.shape[-1])


class Components(NamedTuple):
    """Where the scatter of a gradient comes from."""

    squared_norm: Tensor
    """|G|² over prompts and sampling; with a single prompt, of that prompt."""
    within: Tensor
    """tr of the covariance at fixed prompts: the noise of sampling."""
    between: Tensor
    """tr of the covariance of the prompts' own mean gradients; may come out negative, NaN with a single prompt."""


def variance_components(products: Float[Tensor, "n n"], prompts: int) -> Components:
    """One-way analysis of variance of p prompts with K independent draws each.

    The completions of a prompt may share a baseline and are no independent draws; their gradient together is one.

    Args:
        products: Gram matrix of all draws, those of a prompt in a row, n = p K.
        prompts: p.

    References:
        | Variance Components (Searle, Casella and McCulloch, 1992), the balanced one-way layout

    Example:
        >>> draws = torch.tensor([[1.0], [3.0], [5.0], [7.0]])  # two draws around 2, two around 6
        >>> [round(float(x), 3) for x in variance_components(gram(draws), prompts=2)]
        [12.0, 2.0, 7.0]
    """
    draws, left = divmod(len(products), prompts)
    if left or draws < 2:
        raise ValueError(f"{len(products)} gradients of {prompts} prompts: each needs the same number, 2 or more")
    squares = products.diagonal().mean()
    blocks = products.view(prompts, draws, prompts, draws).mean((1, 3))
    own, grand = blocks.diagonal().mean(), blocks.mean()
    within = (squares - own) * draws / (draws - 1)
    if prompts == 1:
        return Components(grand - within / draws, within, torch.full_like(within, torch.nan))
    scatter = (own - grand) * prompts / (prompts - 1)  # of the prompts' means, sampling noise included
    return Components(grand - scatter / prompts, within, scatter - within / draws)
