"""How good an estimate of a gradient is, beside the true one: bias, noise and direction.

Letters in shapes: n draws, r draws of a reference, s settings that are averaged over.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from grade_lightning.functional.moments import moments


class Alignment(NamedTuple):
    """An estimator beside the true gradient R, at the same parameters; each (s,) or a scalar, unbiased."""

    squared_norm: Tensor
    """|G|² of the estimator's mean."""
    trace: Tensor
    """tr Σ of one estimate."""
    product: Tensor
    """⟨G, R⟩."""
    reference: Tensor
    """|R|²."""
    projection: Tensor
    """E⟨g / |g|, R⟩."""

    @property
    def cosine(self) -> Tensor:
        """Cosine of the estimator's mean to the true gradient, corrected for the noise of both."""
        return self.product.mean() / (_root(self.squared_norm.mean()) * _root(self.reference.mean()))

    @property
    def squared_bias(self) -> Tensor:
        """|G − R|² / |R|², unbiased, so that it may come out negative; not resolved: NaN."""
        bias = (self.squared_norm - 2 * self.product + self.reference).mean()
        return bias / _root(self.reference.mean()) ** 2

    @property
    def relative_std(self) -> Tensor:
        """√tr Σ / |G|: an estimator's noise against its own mean."""
        return _root(self.trace.mean()) / _root(self.squared_norm.mean())

    @property
    def cosine_of_one(self) -> Tensor:
        """Expected cosine of one estimate to the true gradient: what a step of normalised length gains."""
        return self.projection.mean() / _root(self.reference.mean())

    @property
    def scaled_error(self) -> Tensor:
        """Least over c of E|c g − R|² / |R|²: bias and noise in one, at the best learning rate for this estimator."""
        power = self.squared_norm.mean() + self.trace.mean()
        return 1 - self.product.mean() ** 2 / (power * _root(self.reference.mean()) ** 2)


def _root(value: Tensor) -> Tensor:
    return torch.where(value > 0, value, torch.nan).sqrt()


def alignment(
    products: Float[Tensor, "*s n n"], cross: Float[Tensor, "*s n r"], reference: Float[Tensor, "*s r r"]
) -> Alignment:
    """Compare n draws of an estimator with r independent draws of an unbiased one.

    Args:
        products: Gram matrix of the draws.
        cross: their inner products with the reference's draws.
        reference: Gram matrix of these. Where R is known exactly, give it twice: r = 2.

    Example:
        >>> from grade_lightning.functional.moments import gram
        >>> truth = torch.tensor([[2.0, 0.0]] * 2)
        >>> draws = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
        >>> found = alignment(gram(draws), (draws @ truth.T).double(), gram(truth))
        >>> float(found.squared_norm), float(found.trace), float(found.product), float(found.reference)
        (0.0, 2.0, 2.0, 4.0)
        >>> round(float(found.cosine_of_one), 4)
        0.7071
    """
    own, other = moments(products), moments(reference)
    lengths = products.diagonal(dim1=-2, dim2=-1).sqrt()
    directed = torch.where(lengths == 0, 0.0, cross.mean(-1) / lengths)  # a gradient of zero goes nowhere
    return Alignment(own.squared_norm, own.trace, cross.mean((-2, -1)), other.squared_norm, directed.mean(-1))


def scaled_cosine(
    one: Sequence[Tensor | None],
    two: Sequence[Tensor | None],
    scales: Sequence[Tensor | None] | None = None,
    average: Callable[[Tensor], Tensor] = lambda x: x,
) -> Float[Tensor, ""]:
    """⟨g, P h⟩ / √(⟨g, P g⟩ ⟨h, P h⟩) of two gradients, tensor by tensor.

    Args:
        one: g; None is 0.
        two: h.
        scales: the diagonal P ≥ 0; None is 1.
        average: over processes, of the three products.

    Example:
        >>> scaled_cosine([torch.tensor([1.0, 0.0])], [torch.tensor([1.0, 1.0])], [torch.tensor([1.0, 0.0])])
        tensor(1.)
    """
    products = []
    for index, (g, h) in enumerate(zip(one, two, strict=True)):
        scale = None if scales is None else scales[index]
        for a, b in ((g, h), (g, g), (h, h)):
            part = torch.zeros(()) if a is None or b is None else (a * b if scale is None else a * scale * b).sum()
            products.append(part.float())
    dot, first, second = average(torch.stack([x.to(products[0].device) for x in products]).view(-1, 3).sum(0))
    cosine: Tensor = dot / (first * second).sqrt()
    return cosine
