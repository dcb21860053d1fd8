"""A control variate of whole completions for the score function, from a score of each token of the vocabulary.

With scores s that do not depend on the completion itself, δ_t = s(x_t) − Σ_v π_t(v) s(v) has mean 0 given the tokens
before. A policy gradient of R − Σ_t δ_t has less variance the better Σ_t δ_t follows R, and lacks in expectation
exactly Σ_t Σ_v s(v) ∇π_t(v), which is known without sampling and added.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from grade_lightning.functional.advantages import off_others
from grade_lightning.functional.estimators import softmax_vjp
from grade_lightning.functional.replay import Adjoint


def token_scores(directions: Sequence[Adjoint]) -> Float[Tensor, " v"]:
    """s(v) = w · e_v, summed over the tables of embeddings, in float32 or better.

    Args:
        directions: of each table a direction w, (width,).

    Example:
        >>> token_scores([Adjoint(torch.tensor([1.0, -1.0]), torch.eye(2))])
        tensor([ 1., -1.])
    """
    found = [direction(slice(None)) for direction in directions]
    return torch.stack(found).sum(0)


def deviation(
    logps: Float[Tensor, "n v"], tokens: Int[Tensor, " n"], scores: Float[Tensor, "*n v"]
) -> Float[Tensor, " n"]:
    """δ = s(x) − Σ_v π(v) s(v): how much higher each token scores than was to be expected.

    Args:
        logps: log-probabilities; −inf outside of the support.
        tokens: x, what was sampled.
        scores: s of each token, the same at all positions, or of each position its own.

    Example:
        >>> deviation(torch.tensor([[0.25, 0.75]]).log(), torch.tensor([1]), torch.tensor([0.0, 4.0]))
        tensor([1.])
    """
    scores, probs = scores.to(logps), logps.exp()
    if scores.dim() == 1:
        return scores[tokens] - probs @ scores
    return scores.gather(1, tokens.unsqueeze(1)).squeeze(1) - (probs * scores).sum(-1)


def score_function(
    probs: Float[Tensor, "n v"],
    tokens: Int[Tensor, " n"],
    advantages: Float[Tensor, "n 1"],
    scores: Float[Tensor, "*n v"] | None = None,
    share: Float[Tensor, "n 1"] | None = None,
) -> Float[Tensor, "n v"]:
    """The gradient of A log π(x) + share · Σ_v s(v) π(v) at the logits.

    Args:
        probs: π at each position.
        tokens: x, what was sampled.
        advantages: A.
        scores: s of each token, at all positions or at each; none: the first part alone.
        share: of the second part.

    Example:
        >>> score_function(torch.tensor([[0.25, 0.75]]), torch.tensor([0]), torch.tensor([[2.0]]))
        tensor([[ 1.5000, -1.5000]])
    """
    found = (-advantages * probs).scatter_add(1, tokens.unsqueeze(1), advantages.to(probs))
    if scores is None or share is None:
        return found
    return found + share * softmax_vjp(probs, scores.to(probs).expand_as(probs))


def fit(
    rewards: Float[Tensor, "p g"], deviation: Float[Tensor, "p g"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, ""]]:
    """Σ d r, Σ d² and Σ r² of both less their group's mean: the slope of R on Σδ is the first by the second.

    Args:
        rewards: of the completions of p groups; NaN where there is none.
        deviation: Σ_t δ_t of the same.

    Example:
        >>> r = torch.tensor([[1.0, 3.0]])
        >>> [float(x) for x in fit(r, r / 2)]
        [1.0, 0.5, 2.0]
    """
    known = ~rewards.isnan()
    centred = []
    for values in (rewards, deviation):
        values = values.masked_fill(~known, torch.nan)
        centred.append((values - values.nanmean(-1, keepdim=True)).nan_to_num(nan=0.0))
    r, d = centred
    return (r * d).sum(), d.square().sum(), r.square().sum()


def spread_bound(
    rewards: Float[Tensor, " b"], taken: Float[Tensor, "b t"], mask: Bool[Tensor, "b t"], groups: Int[Tensor, " b"]
) -> Float[Tensor, " b"]:
    """How much less is taken off where it spreads more than the rewards of the group do: their ratio, at most 1.

    Rewards that are divided by their spread may be divided by next to nothing; what is taken off then keeps the size of
    one spread at most, and is nothing in a group whose rewards are equal.

    Args:
        rewards: NaN where there is none.
        taken: what is taken off them at each token, or at one place for the whole completion.
        mask: where.
        groups: the group of each row, from 0.

    Example:
        >>> once, group = torch.ones(2, 1, dtype=torch.bool), torch.tensor([0, 0])
        >>> spread_bound(torch.tensor([0.0, 1.0]), torch.tensor([[0.0], [2.0]]), once, group)
        tensor([0.2500, 0.2500])
    """
    known = ~rewards.isnan().unsqueeze(1)
    mask = mask & known
    own = off_others(rewards.unsqueeze(1), known, groups)  # of whole completions: they all have one, not each position
    sizes = [(values.square() * mask).sum(1) for values in (own, off_others(taken, mask, groups))]
    one, other = (size.new_zeros(int(groups.max()) + 1).index_add(0, groups, size)[groups] for size in sizes)
    return (one / other).clamp(max=1).nan_to_num(nan=0.0)


def ridge_regression(
    squares: Float[Tensor, "k k"], along: Float[Tensor, "k m"], penalties: Float[Tensor, " k"]
) -> Float[Tensor, "k m"]:
    """The weights of features that predict best, of sums of products.

    Args:
        squares: Σ φ φᵀ of the features.
        along: Σ φ yᵀ of features and the m numbers that they predict.
        penalties: of the square of each feature's weight.

    Example:
        >>> ridge_regression(torch.eye(2), torch.tensor([[3.0], [4.0]]), torch.tensor([0.0, 1.0]))
        tensor([[3.],
                [2.]])
    """
    least = 1e-12 * squares.diagonal().mean().clamp(min=1)  # a feature that is always 0 has no weight
    system = squares.double() + penalties.double().clamp(min=least).diag()
    found: Tensor = torch.linalg.solve(system, along.double())
    return found.to(along)


def added(sums: Sequence[Tensor], new: Sequence[Tensor]) -> list[Tensor]:
    """Element by element; without any sums what is new.

    Example:
        >>> added([], [torch.tensor(1.0)]), added([torch.tensor(2.0)], [torch.tensor(1.0)])
        ([tensor(1.)], [tensor(3.)])
    """
    return [old.to(x) + x for old, x in zip(sums, new, strict=True)] if sums else list(new)
