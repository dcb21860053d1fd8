"""Truncated importance weights of completions that another distribution drew than the one that is trained."""

from typing import Literal

from jaxtyping import Bool, Float
from torch import Tensor

from grade_lightning.functional.sequences import masked_sum


def truncated_importance(
    logps: Float[Tensor, "b t"],
    engine_logps: Float[Tensor, "b t"],
    mask: Bool[Tensor, "b t"],
    cap: float,
    level: Literal["token", "sequence"] = "token",
) -> Float[Tensor, "b t"]:
    """min(π / π_engine, cap): of each token, or of the whole completion at each of its tokens; 1 outside of the mask.

    With an infinite cap the weights of completions make every estimate unbiased; those of tokens leave out that later
    tokens follow earlier ones, and have less noise.

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
    difference = (logps - engine_logps).masked_fill(~mask, 0)
    if level == "sequence":
        difference = masked_sum(difference, mask).unsqueeze(1) * mask
    return difference.exp().clamp(max=cap)
