"""The value head: expected return of each position."""

from torch import Tensor, nn


class ValueHead(nn.Linear):
    """The value of each position, from its hidden state; 0 everywhere at first.

    Args:
        width: of the hidden states.

    Example:
        >>> import torch
        >>> ValueHead(4)(torch.ones(2, 3, 4)).shape
        torch.Size([2, 3])
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, 1)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Values, float32; (…, width) → (…)."""
        return super().forward(hidden.to(self.weight.dtype)).squeeze(-1).float()
