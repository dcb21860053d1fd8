"""The score of a sampled token, v = e_a − π: the gradient of its log-probability at the logits, in closed form.

With Σπ² and Σπ³ over the vocabulary nothing more than the token's own probability is needed.
"""

from jaxtyping import Float, Int
from torch import Tensor

from grade_lightning.functional.sequences import token_logps


def score_norm(logps: Float[Tensor, "*batch v"], tokens: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """|v|² = 1 − 2π_a + Σπ².

    Args:
        logps: log-probabilities; −inf for tokens that are never sampled.
        tokens: the sampled ones.

    Example:
        >>> import torch
        >>> score_norm(torch.tensor([0.25, 0.75]).log(), torch.tensor(0))
        tensor(1.1250)
    """
    return 1 - 2 * token_logps(logps, tokens).exp() + (2 * logps).exp().sum(-1)


def score_fisher(logps: Float[Tensor, "*batch v"], tokens: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """vᵀ F v with F = diag(π) − ππᵀ, the variance of v under π: Σπv² − (Σπv)².

    Example:
        >>> import torch
        >>> score_fisher(torch.tensor([0.25, 0.75]).log(), torch.tensor(0))
        tensor(0.4219)
    """
    own = token_logps(logps, tokens).exp()
    second = own - 2 * own.square() + (3 * logps).exp().sum(-1)
    first = own - (2 * logps).exp().sum(-1)
    return second - first.square()
