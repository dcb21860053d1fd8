"""What one row may change of a sum of gradients, and the noise that hides it."""

from collections.abc import Sequence

import torch
from torch import Tensor


def clip_factor(gradients: Sequence[Tensor], bound: float) -> Tensor:
    """min(1, C / |g|), so that the gradient of one row has a norm of at most C. NaN for one that is not finite.

    The sum over the rows then changes by at most C if a row is added or left out, and by 2 C if one is replaced.

    Args:
        gradients: g, in parts.
        bound: C.

    References:
        | Deep Learning with Differential Privacy (Abadi et al., 2016), https://arxiv.org/abs/1607.00133

    Example:
        >>> clip_factor([torch.tensor([3.0]), torch.tensor([4.0])], bound=1.0)
        tensor(0.2000)
    """
    norm = torch.stack([torch.linalg.vector_norm(g) for g in gradients]).norm()
    return torch.where(norm.isfinite(), (bound / norm).clamp(max=1), torch.nan)


def gaussian(like: Tensor, std: float, seed: int) -> Tensor:
    """Noise of a tensor's shape, type and device; the same for the same seed.

    Example:
        >>> bool((gaussian(torch.zeros(3), 1.0, 7) == gaussian(torch.ones(3), 1.0, 7)).all())
        True
    """
    generator = torch.Generator(like.device).manual_seed(seed)
    return std * torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=generator)
