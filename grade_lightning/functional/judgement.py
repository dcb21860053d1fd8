"""What a judge's next token says."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor


def log_odds(logits: Float[Tensor, "*b v"], yes: Sequence[int], no: Sequence[int]) -> Float[Tensor, "*b"]:
    """Log P(yes) − log P(no); its sigmoid is P(yes) / (P(yes) + P(no)).

    Args:
        logits: of the next token.
        yes: tokens that say yes, one way or another.
        no: tokens that say no.

    Example:
        >>> import torch
        >>> log_odds(torch.tensor([0.1, 0.2, 0.3, 0.4]).log(), yes=[0, 3], no=[1]).sigmoid()
        tensor(0.7143)
    """
    return logits[..., list(yes)].logsumexp(-1) - logits[..., list(no)].logsumexp(-1)
