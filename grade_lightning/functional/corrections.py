"""Truncated importance weights of completions that another distribution drew than the one that is trained."""

from typing import Literal

from jaxtyping import Bool, Float
from torch import Tensor

from grade_lightning.functional.sequences import masked_sum

WeightLevel = Literal["token", "before", "prefix", "sequence"]
"""Of what a ratio is taken: a token, the tokens before it, those and itself, the whole completion."""


def log_weights(
    logps: Float[Tensor, "b t"], engine_logps: Float[Tensor, "b t"], mask: Bool[Tensor, "b t"], level: WeightLevel
) -> Float[Tensor, "b t"]:
    """Log π / π_engine at each token, 0 outside of the mask."""
    difference = (logps - engine_logps).masked_fill(~mask, 0)
    if level == "token":
        return difference
    if level == "sequence":
        return masked_sum(difference, mask).unsqueeze(1) * mask
    prefix = difference.cumsum(-1)
    return (prefix if level == "prefix" else prefix - difference).masked_fill(~mask, 0)


def truncated_importance(
    logps: Float[Tensor, "b t"],
    engine_logps: Float[Tensor, "b t"],
    mask: Bool[Tensor, "b t"],
    cap: float,
    level: WeightLevel = "token",
) -> Float[Tensor, "b t"]:
    """min(π / π_engine, cap) at each token; 1 outside of the mask.

    With an infinite cap the weights of whole completions make every estimate unbiased; `prefix` and `before` do so for
    what depends on no later token. Those of tokens leave out that later tokens follow earlier ones, with less noise.

    Args:
        logps: log π of the tokens, of the policy as the training pass sees it when they were drawn.
        engine_logps: log-probabilities by which they were drawn.
        mask: tokens that were sampled.
        cap: the largest weight.
        level: of what a ratio is taken.

    References:
        | Your Efficient RL Framework Secretly Brings You Off-Policy RL Training (Yao et al., 2025),
          https://fengyao.notion.site/off-policy-rl

    Example:
        >>> import torch
        >>> logps, engine = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.4, 0.1]]).log()
        >>> truncated_importance(logps, engine, torch.ones(1, 2, dtype=torch.bool), cap=2.0)
        tensor([[1.2500, 2.0000]])
    """
    return log_weights(logps, engine_logps, mask, level).exp().clamp(max=cap)


def effective_share(
    logps: Float[Tensor, "b t"], engine_logps: Float[Tensor, "b t"], mask: Bool[Tensor, "b t"]
) -> Float[Tensor, ""]:
    """(Σ w)² / (b Σ w²) of the weights of whole completions: the share of them that the rest is worth, 1 at best.

    Example:
        >>> import torch
        >>> logps, engine = torch.tensor([[0.75], [0.25]]).log(), torch.tensor([[0.25], [0.75]]).log()
        >>> effective_share(logps, engine, torch.ones(2, 1, dtype=torch.bool))  # weights 3 and 1/3
        tensor(0.6098)
    """
    logs = masked_sum((logps - engine_logps).masked_fill(~mask, 0), mask)
    return (2 * logs.logsumexp(0) - (2 * logs).logsumexp(0)).exp() / len(logs)
