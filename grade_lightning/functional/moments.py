"""Moments of random gradients: how large the mean is, how much they scatter, and how sure one is of both.

A gradient is a vector g with mean G and covariance Σ. All that is asked here (|G|², tr Σ, their ratio, cosines) is
made of inner products between independent draws, so draws enter by their Gram matrix; draws may be sketches
(:func:`count_sketch`), whose inner products are right on average, and parts of a model add up: the Gram matrix of the
whole is the sum of those of its layers.

Ratios are ratios of averages: the average of ratios is biased without bound. The unbiased |G|² can come out at or
below zero; then the signal is *not resolved*, and what is divided by it is NaN.

Letters in shapes: n draws, r draws of a reference, d parameters, k buckets, s settings that are averaged over.
"""

import math
from collections.abc import Callable
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


# ---- how sure -----------------------------------------------------------------------------------------------------


class Interval(NamedTuple):
    """An estimate and where the truth lies with a given probability."""

    estimate: Tensor
    low: Tensor
    high: Tensor


def student_quantile(level: float, freedom: int) -> float:
    """Half-width, in standard errors, of an interval of this level from `freedom` degrees of freedom.

    Exact for 1 and 2, from the Cornish–Fisher expansion for more (below 0.5 % off at 95 %).

    Example:
        >>> [round(student_quantile(0.95, f), 2) for f in (1, 2, 3, 10, 1000)]
        [12.71, 4.3, 3.18, 2.23, 1.96]
    """
    if freedom == 1:
        return math.tan(math.pi * level / 2)
    if freedom == 2:
        return level * math.sqrt(2 / (1 - level**2))
    z = float(torch.special.ndtri(torch.tensor((1 + level) / 2, dtype=torch.float64)))
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return float(z + sum(term / freedom**i for i, term in enumerate(terms, start=1)))


def jackknife(statistic: Callable[[Tensor], Tensor], units: int, level: float = 0.95) -> Interval:
    """Interval of a smooth function of averages, by leaving out one unit at a time; around the plain estimate.

    Args:
        statistic: maps the indices of the units to count (at least n − 1 of them) to a tensor of any shape.
        units: independent units, n.
        level: probability of the interval, by Student's t with n − 1 degrees of freedom.

    References:
        | Bias and Confidence in Not Quite Large Samples (Tukey, 1958)

    Example:
        >>> data = torch.tensor([1.0, 2.0, 3.0])
        >>> [round(float(x), 3) for x in jackknife(lambda rows: data[rows].mean(), 3)]
        [2.0, -0.484, 4.484]
    """
    estimate, values = statistic(torch.arange(units)), pseudo_values(statistic, units)
    half = student_quantile(level, units - 1) * values.std(0) / math.sqrt(units)
    return Interval(estimate, estimate - half, estimate + half)


def pseudo_values(statistic: Callable[[Tensor], Tensor], units: int) -> Tensor:
    """Tukey's pseudo-values, (n, …): n times the whole less n − 1 times what is left without one unit.

    They can be treated as n independent observations of the statistic.

    Example:
        >>> data = torch.tensor([1.0, 2.0, 3.0])
        >>> pseudo_values(lambda rows: data[rows].mean(), 3)
        tensor([1., 2., 3.])
    """
    if units < 2:
        raise ValueError(f"units = {units}: an interval needs 2 or more")
    every = torch.arange(units)
    without = torch.stack([statistic(every[every != unit]) for unit in range(units)])
    return units * statistic(every) - (units - 1) * without


def ratio_interval(above: Float[Tensor, " n"], below: Float[Tensor, " n"], level: float = 0.95) -> Interval:
    """Interval of a ratio of means, both uncertain and correlated, for a ratio that is not negative.

    The set of all θ for which mean(above − θ below) is not significantly different from 0. Where the mean of `below`
    is not significantly above 0, it has no upper end: infinity. Where that mean is not even positive, the
    estimate is NaN. The ends are not below 0, the estimate may be.

    Args:
        above: observations of the numerator, one for each independent unit; pseudo-values count as such.
        below: and of the denominator.
        level: probability of the interval.

    References:
        | Some Problems in Interval Estimation (Fieller, 1954)

    Example:
        >>> [round(float(x), 3) for x in ratio_interval(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 2.0, 2.0]))]
        [1.0, 0.0, 2.242]
        >>> [float(x) for x in ratio_interval(torch.tensor([1.0, 2.0]), torch.tensor([1.0, -3.0]))]
        [nan, 0.0, inf]
    """
    n = len(above)
    a, b = float(above.double().mean()), float(below.double().mean())
    low, high = 0.0, math.inf
    if n < 2:
        low = high = math.nan
    elif b > 0:
        spread = torch.stack([above, below]).double().cov() * student_quantile(level, n - 1) ** 2 / n
        (aa, ab), (_, bb) = spread.tolist()
        # (a − θ b)² ≤ aa − 2 θ ab + θ² bb
        lead, middle, rest = b**2 - bb, a * b - ab, a**2 - aa
        discriminant = middle**2 - lead * rest
        if lead > 0:
            root = math.sqrt(max(discriminant, 0.0))
            low, high = (middle - root) / lead, (middle + root) / lead
        elif lead < 0 and discriminant > 0:  # all but what lies between two values
            first, second = sorted((middle + sign * math.sqrt(discriminant)) / lead for sign in (-1, 1))
            low = second if first < 0 else 0.0
    ends = (
        a / b if b > 0 else math.nan,
        low if math.isnan(low) else max(low, 0.0),
        high if math.isnan(high) else max(high, 0.0),
    )
    return Interval(*(torch.tensor(x, dtype=torch.float64) for x in ends))


# ---- one after the other, and small ---------------------------------------------------------------------------------


class Running(NamedTuple):
    """Number, mean and sum of squared deviations of the vectors seen so far."""

    number: int
    mean: Tensor
    deviations: Tensor

    @property
    def trace(self) -> Tensor:
        """Trace tr Σ, unbiased; NaN before the second vector."""
        return self.deviations.sum() / (self.number - 1) if self.number > 1 else self.mean.new_full((), torch.nan)

    @property
    def squared_norm(self) -> Tensor:
        """|G|², unbiased."""
        return self.mean.square().sum() - self.trace / self.number


def welford(seen: Running | None, vector: Float[Tensor, " d"]) -> Running:
    """Add a vector to the running moments.

    References:
        | Note on a Method for Calculating Corrected Sums of Squares and Products (Welford, 1962)

    Example:
        >>> seen = welford(welford(None, torch.tensor([1.0])), torch.tensor([3.0]))
        >>> seen.mean, seen.trace, seen.squared_norm
        (tensor([2.]), tensor(2.), tensor(3.))
    """
    one = Running(1, vector.detach().clone(), torch.zeros_like(vector))
    return one if seen is None else merge(seen, one)


def merge(one: Running, two: Running) -> Running:
    """Running moments of two sets of vectors together.

    References:
        | Updating Formulae and a Pairwise Algorithm for Computing Sample Variances (Chan, Golub and LeVeque, 1979)

    Example:
        >>> a, b = (welford(None, torch.tensor([x])) for x in (1.0, 3.0))
        >>> merge(a, b).deviations
        tensor([2.])
    """
    number = one.number + two.number
    step = two.mean - one.mean
    mean = one.mean + step * (two.number / number)
    deviations = one.deviations + two.deviations + step.square() * (one.number * two.number / number)
    return Running(number, mean, deviations)


def count_sketch(
    vector: Float[Tensor, " d"], buckets: int, seed: int, chunk: int = 2**20
) -> Float[Tensor, " {buckets}"]:
    """A few numbers whose inner products are, on average over seeds, those of the vectors.

    Each component is added to a random bucket with a random sign. Linear; a relative standard deviation of about
    √(2 / buckets). The same seed and chunk give the same buckets and signs on every process of the same kind of device.

    Args:
        vector: what to sketch, in any floating type; the sketch is float32 or better.
        buckets: its length.
        seed: of buckets and signs.
        chunk: components that are worked on at a time: the memory that is needed.

    References:
        | Finding Frequent Items in Data Streams (Charikar, Chen and Farach-Colton, 2002)
        | Feature Hashing for Large Scale Multitask Learning (Weinberger et al., 2009), https://arxiv.org/abs/0902.2206

    Example:
        >>> one, two = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))
        >>> a, b = (count_sketch(x, 64, seed=1) for x in (one, two))
        >>> bool(torch.allclose(count_sketch(one + two, 64, seed=1), a + b, atol=1e-5))
        True
    """
    generator = torch.Generator(vector.device).manual_seed(seed)
    sketch = vector.new_zeros(buckets, dtype=torch.promote_types(vector.dtype, torch.float32))
    for part in vector.split(chunk):
        draw = torch.randint(2 * buckets, part.shape, generator=generator, device=vector.device)
        signed = torch.where(draw % 2 == 0, part, -part).to(sketch.dtype)
        sketch.index_add_(0, draw // 2, signed)
    return sketch
