"""Cotangents of a sampled token: what the gradient at a one-hot token does to the logits that it came from.

Every function maps the adjoint a = ∂L/∂(one-hot token) to a cotangent on the logits; all are linear in a.
"""

from jaxtyping import Float, Int
from torch import Tensor


def softmax_vjp(probs: Float[Tensor, "*batch v"], adjoint: Float[Tensor, "*batch v"]) -> Float[Tensor, "*batch v"]:
    """Vector-Jacobian product of softmax at `probs`: q ⊙ (a − ⟨q, a⟩).

    Example:
        >>> import torch
        >>> softmax_vjp(torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.0]))
        tensor([ 0.2500, -0.2500])
    """
    return (adjoint - (probs * adjoint).sum(-1, keepdim=True)).mul_(probs)


def straight_through(
    logits: Float[Tensor, "*batch v"], adjoint: Float[Tensor, "*batch v"], tau: float = 1.0
) -> Float[Tensor, "*batch v"]:
    """Straight-through: the token is treated as if it were softmax(ℓ / τ).

    References:
        | Estimating or Propagating Gradients Through Stochastic Neurons (Bengio et al., 2013),
          https://arxiv.org/abs/1308.3432

    Example:
        >>> import torch
        >>> straight_through(torch.tensor([0.5, 0.5]).log(), torch.tensor([1.0, 0.0]))
        tensor([ 0.2500, -0.2500])
    """
    if tau == 1:
        return softmax_vjp(logits.softmax(-1), adjoint)
    return softmax_vjp((logits / tau).softmax(-1), adjoint) / tau


def straight_through_gumbel(
    relaxed: Float[Tensor, "draws *batch v"], adjoint: Float[Tensor, "*batch v"], tau: float
) -> Float[Tensor, "*batch v"]:
    """Straight-through Gumbel-softmax, averaged over posterior draws of the noise.

    One draw is the estimator of GRADE-STE; the mean over several is Gumbel-Rao: the same expectation, less
    variance, no further sampling.

    Args:
        relaxed: relaxed tokens w (:func:`~grade_lightning.functional.gumbel.relaxed_tokens`), one for each draw.
        adjoint: gradient with respect to the one-hot token.
        tau: the temperature that `relaxed` was made with.

    References:
        | GRADE (Nel, 2025), https://arxiv.org/abs/2601.11574
        | Rao-Blackwellizing the Straight-Through Gumbel-Softmax Gradient Estimator (Paulus et al., 2020),
          https://arxiv.org/abs/2010.04838

    Example:
        >>> import torch
        >>> straight_through_gumbel(torch.tensor([[0.5, 0.5], [1.0, 0.0]]), torch.tensor([1.0, 0.0]), tau=1.0)
        tensor([ 0.1250, -0.1250])
    """
    cotangent = softmax_vjp(relaxed[0], adjoint)
    for weights in relaxed[1:]:
        cotangent = cotangent + softmax_vjp(weights, adjoint)
    return cotangent / (len(relaxed) * tau)


def reinmax(
    logits: Float[Tensor, "*batch v"],
    tokens: Int[Tensor, "*batch"],
    adjoint: Float[Tensor, "*batch v"],
    tau: float = 1.0,
) -> Float[Tensor, "*batch v"]:
    """ReinMax: a second-order (Heun) correction of straight-through, exact for quadratic rewards at τ = 1.

    2 J(π_D) a − ½ J(p) a with π_D = (softmax(ℓ / τ) + one-hot) / 2.

    References:
        | Bridging Discrete and Backpropagation: Straight-Through and Beyond (Liu et al., 2023),
          https://arxiv.org/abs/2304.08612

    Example:
        >>> import torch
        >>> reinmax(torch.tensor([0.5, 0.5]).log(), torch.tensor(0), torch.tensor([1.0, 0.0]))
        tensor([ 0.2500, -0.2500])
    """
    return 2 * softmax_vjp(midpoint(logits / tau, tokens), adjoint) - softmax_vjp(logits.softmax(-1), adjoint) / 2


def midpoint(logits: Float[Tensor, "*batch v"], tokens: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch v"]:
    """Half-way between the distribution and the sampled token, (softmax(ℓ) + one-hot) / 2.

    Example:
        >>> import torch
        >>> midpoint(torch.tensor([0.5, 0.5]).log(), torch.tensor(0))
        tensor([0.7500, 0.2500])
    """
    probs = logits.softmax(-1)
    return probs.scatter_add(-1, tokens.unsqueeze(-1), probs.new_ones(*tokens.shape, 1)) / 2


def reinmax_rao(
    logits: Float[Tensor, "*batch v"],
    relaxed: Float[Tensor, "draws *batch v"],
    adjoint: Float[Tensor, "*batch v"],
    tau: float,
) -> Float[Tensor, "*batch v"]:
    """ReinMax-Rao: ReinMax with Gumbel-Rao in the place of its first Jacobian.

    2 G − ½ J(p) a, with G the mean of :func:`straight_through_gumbel` at the :func:`midpoint` π_D = (p + one-hot) / 2.

    Args:
        logits: ℓ.
        relaxed: relaxed tokens (:func:`~grade_lightning.functional.gumbel.relaxed_tokens`) of log π_D given the sampled
            token, one for each draw.
        adjoint: gradient with respect to the one-hot token.
        tau: the temperature that `relaxed` was made with.

    References:
        | Beyond ReinMax: Low-Variance Gradient Estimators for Discrete Latent Variables (Wang and Bui, 2026),
          https://arxiv.org/abs/2603.08257. Departure: the noise is held fixed in the derivative, as in Gumbel-Rao.

    Example:
        >>> import torch
        >>> even = torch.tensor([0.5, 0.5])
        >>> reinmax_rao(even.log(), torch.tensor([[0.75, 0.25]]), torch.tensor([1.0, 0.0]), tau=1.0)
        tensor([ 0.2500, -0.2500])
    """
    return 2 * straight_through_gumbel(relaxed, adjoint, tau) - softmax_vjp(logits.softmax(-1), adjoint) / 2
