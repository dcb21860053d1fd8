r"""One loss line for every policy-gradient method, in score-coefficient form.

.. math:: L = - \sum_{i,t} w_{it} \; \mathrm{sg}\big[ S\big( c(e^{S(\delta)}, A) \, A \big) \big]_{it} \log \pi(y_{it})

δ is log π − log π_old of a token. The *level* S is the mean over a token (the identity), a turn or a sequence; the
*gate* c turns the ratio into the coefficient of A ∇log π; the *aggregation* makes the weights w of the mask. The
gradient is that of the usual surrogate (a minimum of clipped products and so on), without gradients through clamps. The
value is not the surrogate's: only its gradient means something. A weight of tokens or samples is a factor of A.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Level: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(values, mask) → means over each segment, spread over its tokens; all (B, T)."""
Gate: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(ratio, advantages) → coefficient ≥ 0; all (B, T)."""


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
        mask: which tokens are the completion's; what stands elsewhere does not matter.
        weights: the aggregation's, constant within each segment of the level.
        gate: one of this module's, its bounds filled in.
        level: :func:`token_level`, :func:`sequence_level`, or :func:`turn_level` with its turns.

    Example:
        >>> logps = torch.tensor([[-1.0, -2.0]], requires_grad=True)
        >>> mask = torch.ones(1, 2, dtype=torch.bool)
        >>> weights = sequence_mean(mask, Totals(tokens=2, sequences=1))
        >>> loss = policy_loss(logps, logps.detach(), torch.ones(1, 2), mask, weights, reinforce, token_level)
        >>> torch.autograd.grad(loss, logps)
        (tensor([[-0.5000, -0.5000]]),)
    """
    ratio = importance_ratio(logps, old_logps, mask, level)
    coefficient = level(gate(ratio, advantages) * advantages, mask)
    terms = (weights * coefficient).detach() * logps.masked_fill(~mask, 0)
    return -terms.masked_fill(~mask, 0).sum()


def importance_ratio(
    logps: Float[Tensor, "b t"],
    old_logps: Float[Tensor, "b t"],
    mask: Bool[Tensor, "b t"],
    level: Level,
) -> Float[Tensor, "b t"]:
    """The exponential of the level's mean of log π − log π_old: at the levels of turns and sequences a geometric mean.

    Example:
        >>> logps, old = torch.tensor([[0.3, 0.1]]), torch.tensor([[0.0, 0.0]])
        >>> importance_ratio(logps, old, torch.ones(1, 2, dtype=torch.bool), sequence_level).log()
        tensor([[0.2000, 0.2000]])
    """
    delta = (logps - old_logps).detach().masked_fill(~mask, 0)
    return level(delta, mask).exp()


# ---- levels ---------------------------------------------------------------------------------------------------------


def token_level(values: Float[Tensor, "b t"], mask: Bool[Tensor, "b t"]) -> Float[Tensor, "b t"]:
    """Each token by itself."""
    return values


def sequence_level(values: Float[Tensor, "b t"], mask: Bool[Tensor, "b t"]) -> Float[Tensor, "b t"]:
    """The mean over each sequence, at each of its tokens.

    References:
        | Group Sequence Policy Optimization (Zheng et al., 2025), https://arxiv.org/abs/2507.18071

    Example:
        >>> sequence_level(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[True, True, False]]))
        tensor([[2., 2., 2.]])
    """
    mean = values.masked_fill(~mask, 0).sum(-1) / mask.sum(-1).clamp(min=1)
    return mean.unsqueeze(-1).expand_as(values)


def turn_level(
    values: Float[Tensor, "b t"], mask: Bool[Tensor, "b t"], turns: Int[Tensor, "b t"]
) -> Float[Tensor, "b t"]:
    """The mean over each turn; `turns` numbers the turn that each token belongs to, from 0.

    Example:
        >>> mask = torch.ones(1, 3, dtype=torch.bool)
        >>> turn_level(torch.tensor([[1.0, 3.0, 9.0]]), mask, torch.tensor([[0, 0, 1]]))
        tensor([[2., 2., 9.]])
    """
    sums = values.new_zeros(len(values), int(turns.max()) + 1)
    counts = sums.scatter_add(1, turns, mask.to(values.dtype)).clamp(min=1)
    means = sums.scatter_add(1, turns, values.masked_fill(~mask, 0)) / counts
    return means.gather(1, turns)


# ---- gates: the coefficient of A ∇log π ----------------------------------------------------------------------------


def reinforce(ratio: Float[Tensor, "b t"], advantages: Float[Tensor, "b t"]) -> Float[Tensor, "b t"]:
    """1: no importance weight.

    References:
        | Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning (Williams, 1992)
    """
    return torch.ones_like(ratio)


def importance(ratio: Float[Tensor, "b t"], advantages: Float[Tensor, "b t"]) -> Float[Tensor, "b t"]:
    """The ratio itself, unbounded."""
    return ratio


def clipped(
    ratio: Float[Tensor, "b t"],
    advantages: Float[Tensor, "b t"],
    low: float,
    high: float,
    dual: float | None = None,
) -> Float[Tensor, "b t"]:
    """The ratio; 0 once it has gone beyond the bound to which the advantage pushes it.

    Args:
        ratio: π / π_old.
        advantages: A.
        low: bound of the ratio where A < 0, such as 0.8.
        high: bound of the ratio where A > 0, such as 1.2.
        dual: also 0 where A < 0 and the ratio exceeds this (dual clip).

    References:
        | Proximal Policy Optimization Algorithms (Schulman et al., 2017), https://arxiv.org/abs/1707.06347
        | dual clip: Mastering Complex Control in MOBA Games with Deep Reinforcement Learning (Ye et al., 2020),
          https://arxiv.org/abs/1912.09729

    Example:
        >>> ratio, up = torch.tensor([[0.5, 1.5, 1.1]]), torch.ones(1, 3)
        >>> clipped(ratio, up, 0.8, 1.2)
        tensor([[0.5000, 0.0000, 1.1000]])
        >>> clipped(ratio, -up, 0.8, 1.2)
        tensor([[0.0000, 1.5000, 1.1000]])
    """
    beyond = ((advantages > 0) & (ratio > high)) | ((advantages < 0) & (ratio < low))
    if dual is not None:
        beyond |= (advantages < 0) & (ratio > dual)
    return ratio.masked_fill(beyond, 0)


def gppo(
    ratio: Float[Tensor, "b t"],
    advantages: Float[Tensor, "b t"],
    low: float,
    high: float,
    low_scale: float = 1.0,
    high_scale: float = 1.0,
    dual: float | None = None,
) -> Float[Tensor, "b t"]:
    """As :func:`clipped`, but what it would cut off keeps the bound (times a scale) as its coefficient.

    References:
        | Klear-Reasoner: Advancing Reasoning Capability via Gradient-Preserving Clipping Policy Optimization
          (Su et al., 2025), https://arxiv.org/abs/2508.07629
        | the scales: CE-GPPO (2025), https://arxiv.org/abs/2509.20712

    Example:
        >>> gppo(torch.tensor([[0.5, 1.5]]), torch.tensor([[1.0, 1.0]]), 0.8, 1.2)
        tensor([[0.5000, 1.2000]])
    """
    above, below = (advantages > 0) & (ratio > high), (advantages < 0) & (ratio < low)
    kept = ratio.masked_fill(above, high_scale * high).masked_fill(below, low_scale * low)
    return kept if dual is None else kept.masked_fill((advantages < 0) & (ratio > dual), 0)


def cispo(
    ratio: Float[Tensor, "b t"], advantages: Float[Tensor, "b t"], low: float, high: float
) -> Float[Tensor, "b t"]:
    """The ratio, bounded on both sides whatever the advantage's sign: every token keeps a gradient.

    References:
        | MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention (2025),
          https://arxiv.org/abs/2506.13585

    Example:
        >>> cispo(torch.tensor([[0.5, 7.0]]), torch.ones(1, 2), 0.0, 5.0)
        tensor([[0.5000, 5.0000]])
    """
    return ratio.clamp(low, high)


def sapo(
    ratio: Float[Tensor, "b t"], advantages: Float[Tensor, "b t"], tau_pos: float, tau_neg: float
) -> Float[Tensor, "b t"]:
    """The ratio r times sech²(τ (r − 1) / 2): a soft gate; τ depends on the advantage's sign.

    References:
        | Soft Adaptive Policy Optimization (Gao et al., 2025), https://arxiv.org/abs/2511.20347

    Example:
        >>> sapo(torch.tensor([[1.0, 3.0]]), torch.ones(1, 2), 1.0, 1.05)
        tensor([[1.0000, 1.2599]])
    """
    tau = torch.where(advantages > 0, ratio.new_tensor(tau_pos), tau_neg)
    return ratio / (tau / 2 * (ratio - 1)).cosh().square()


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


# ---- aggregations: the weights w ------------------------------------------------------------------------------------


class Totals(NamedTuple):
    """What a mean is taken over: all of an optimizer step, over its micro-batches and processes.

    Where losses of W processes and A micro-batches are averaged afterwards, these are 1 / (W A) of the counts.
    """

    tokens: float
    sequences: float


def token_mean(mask: Bool[Tensor, "b t"], totals: Totals) -> Float[Tensor, "b t"]:
    """Every token the same: 1 / tokens.

    Example:
        >>> token_mean(torch.tensor([[True, True], [True, False]]), Totals(tokens=3, sequences=2))
        tensor([[0.3333, 0.3333],
                [0.3333, 0.0000]])
    """
    return mask.float() / totals.tokens


def sequence_mean(mask: Bool[Tensor, "b t"], totals: Totals) -> Float[Tensor, "b t"]:
    """Every sequence the same, whatever its length: 1 / (sequences × its length).

    Example:
        >>> sequence_mean(torch.tensor([[True, True], [True, False]]), Totals(tokens=3, sequences=2))
        tensor([[0.2500, 0.2500],
                [0.5000, 0.0000]])
    """
    return mask.float() / mask.sum(-1, keepdim=True).clamp(min=1) / totals.sequences


def constant(mask: Bool[Tensor, "b t"], totals: Totals, length: int) -> Float[Tensor, "b t"]:
    """Token sum over a constant length, mean over sequences: 1 / (sequences × length).

    References:
        | Understanding R1-Zero-Like Training: A Critical Perspective (Liu et al., 2025),
          https://arxiv.org/abs/2503.20783
    """
    return mask.float() / (totals.sequences * length)


def sequence_sum(mask: Bool[Tensor, "b t"], totals: Totals) -> Float[Tensor, "b t"]:
    """Token sum, mean over sequences, 1 / sequences: the gradient of the expected reward itself."""
    return mask.float() / totals.sequences
