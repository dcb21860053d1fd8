"""Drawing tokens."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def draw(logps: Float[Tensor, "b v"]) -> Int[Tensor, " b"]:
    """Draw a token of each distribution by inversion: one random number for each, where `multinomial` takes V.

    Sums are in float64 (float32 on MPS, which has no other), so that a token above a probability of about 1e-16 has its
    chance.

    Args:
        logps: normalised log-probabilities; −inf for a token that is never drawn.

    Example:
        >>> draw(torch.tensor([[0.0, 0.5, 0.5, 0.0], [0.0, 0.0, 0.0, 1.0]]).log())[1]
        tensor(3)
    """
    exact = torch.float32 if logps.device.type == "mps" else torch.float64
    sums = logps.exp().cumsum(-1, dtype=exact)
    below = torch.rand(len(logps), 1, dtype=exact, device=logps.device) * sums[:, -1:]
    return torch.searchsorted(sums, below, right=True).squeeze(1).clamp(max=logps.shape[1] - 1)
