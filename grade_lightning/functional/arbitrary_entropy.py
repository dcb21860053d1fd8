"""Entropy control by samples of another temperature, or by weights that stand for them."""

from jaxtyping import Bool, Float, Int
from torch import Tensor

from grade_lightning.functional.sequences import token_logps


def tempered_log_ratio(
    logps: Float[Tensor, "*batch v"], tokens: Int[Tensor, "*batch"], temperature: float
) -> Float[Tensor, "*batch"]:
    """Log π_T − log π of the sampled tokens, π_T ∝ π^(1/T).

    Args:
        logps: log π; −inf for tokens that are never sampled.
        tokens: the sampled ones.
        temperature: T.

    Example:
        >>> import torch
        >>> tempered_log_ratio(torch.tensor([0.2, 0.8]).log(), torch.tensor(0), temperature=0.5).exp()
        tensor(0.2941)
    """
    own = token_logps(logps, tokens)
    return own / temperature - (logps / temperature).logsumexp(-1) - own


def entropy_share(entropy: float, target: float, correct: Float[Tensor, ""], most: float) -> Float[Tensor, ""]:
    """α / (1 + α) with α = min(|H_target − H|, most) / share of correct completions; 0 where none is correct.

    Example:
        >>> import torch
        >>> entropy_share(0.4, target=0.5, correct=torch.tensor(0.5), most=0.1)
        tensor(0.1667)
    """
    alpha = min(abs(target - entropy), most) / correct.where(correct > 0, 1)
    return (alpha / (1 + alpha)).where(correct > 0, 0)


def reweighted(
    advantages: Float[Tensor, "b t"],
    log_ratio: Float[Tensor, "b t"],
    correct: Bool[Tensor, " b"],
    share: Float[Tensor, ""],
) -> Float[Tensor, "b t"]:
    """(1 − α) A + α [correct] π_T / π.

    Args:
        advantages: A.
        log_ratio: log π_T − log π of the tokens.
        correct: of each completion.
        share: α.
    """
    return (1 - share) * advantages + share * correct.unsqueeze(1) * log_ratio.exp()
