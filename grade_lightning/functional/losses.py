r"""One loss line for every policy-gradient method, in score-coefficient form; and the loss of a value head.

.. math:: L = - \sum_{i,t} w_{it} \; \mathrm{sg}\big[ S\big( c(e^{S(\delta)}, A) \, A \big) \big]_{it} \log \pi(y_{it})

δ is log π − log π_old of a token. The *level* S (:mod:`.ratios`) is the mean over a token (the identity), a turn or a
sequence; the *gate* c (:mod:`.gates`) turns the ratio into the coefficient of A ∇log π; the *aggregation*
(:mod:`.aggregation`) makes the weights w of the mask. The gradient is that of the usual surrogate (a minimum of clipped
products and so on), without gradients through clamps. The value is not the surrogate's: only its gradient means
something. A weight of tokens or samples is a factor of A.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from grade_lightning.functional.gates import Gate
from grade_lightning.functional.ratios import Level, importance_ratio


def policy_loss(
    logps: Float[Tensor, "b t"],
    old_logps: Float[Tensor, "b t"],
    advantages: Float[Tensor, "b t"],
    mask: Bool[Tensor, "b t"],
    weights: Float[Tensor, "b t"],
    gate: Gate,
    level: Level,
) -> Float[Tensor, ""]:
    """The loss line.

    Args:
        logps: log π of the sampled tokens, with its graph.
        old_logps: log-probabilities at the time of sampling.
        advantages: A, without a graph.
        mask: tokens that are trained on; other positions are ignored.
        weights: the aggregation's, constant within each segment of the level.
        gate: one of :mod:`.gates`, its bounds filled in.
        level: one of :mod:`.ratios`.

    Example:
        >>> logps = torch.tensor([[-1.0, -2.0]], requires_grad=True)
        >>> mask = torch.ones(1, 2, dtype=torch.bool)
        >>> from grade_lightning.functional.aggregation import Normalizers, sequence_mean
        >>> from grade_lightning.functional.gates import reinforce
        >>> from grade_lightning.functional.ratios import token_level
        >>> weights = sequence_mean(mask, Normalizers(tokens=2, sequences=1))
        >>> loss = policy_loss(logps, logps.detach(), torch.ones(1, 2), mask, weights, reinforce, token_level)
        >>> torch.autograd.grad(loss, logps)
        (tensor([[-0.5000, -0.5000]]),)
    """
    ratio = importance_ratio(logps, old_logps, mask, level)
    coefficient = level(gate(ratio, advantages) * advantages, mask)
    terms = (weights * coefficient).detach() * logps.masked_fill(~mask, 0)
    return -terms.masked_fill(~mask, 0).sum()


def clipped_value_loss(
    values: Float[Tensor, "b t"], old_values: Float[Tensor, "b t"], returns: Float[Tensor, "b t"], epsilon: float
) -> Float[Tensor, "b t"]:
    """Half of the larger of two squared errors: the value's own, and that of the value held within ±ε of the old one.

    References:
        | The N+ Implementation Details of RLHF with PPO (Huang et al., 2024), https://arxiv.org/abs/2403.17031

    Example:
        >>> clipped_value_loss(torch.tensor([[1.0]]), torch.tensor([[0.0]]), torch.tensor([[1.0]]), epsilon=0.2)
        tensor([[0.3200]])
    """
    near = old_values + (values - old_values).clamp(-epsilon, epsilon)
    return torch.maximum((values - returns).square(), (near - returns).square()) / 2
