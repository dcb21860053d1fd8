"""What one forward pass says of each token of a rollout."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass
class TokenStats:
    """Each (B, T); 0 at positions that were not sampled."""

    logps: Tensor
    """log π of the sampled tokens, of the distribution that was sampled."""
    log_ratio: Tensor
    """log π − log π_ref of the sampled tokens, at the sampling temperature and untruncated."""
    kl: Tensor
    """Exact KL(π‖π_ref), nats."""
    entropy: Tensor
    """Entropy, nats; no graph."""
    ref_logps: Tensor
    """log π_ref of the sampled tokens, at the sampling temperature and untruncated; no graph."""
    values: Tensor | None = None
    """Expected return, from a value head."""

    def map(self, function: Callable[[Tensor], Tensor]) -> "TokenStats":
        """The same with `function` applied to each tensor."""
        return replace(self, **{name: function(tensor) for name, tensor in self._tensors().items()})

    def detach(self) -> "TokenStats":
        """The same without graphs."""
        return self.map(Tensor.detach)

    @classmethod
    def join(cls, parts: "Sequence[TokenStats]", length: int) -> "TokenStats":
        """Those of several rollouts, padded to `length` tokens."""
        padded = [part.map(lambda x: pad(x, (0, length - x.shape[1])))._tensors() for part in parts]
        return cls(**{name: torch.cat([part[name] for part in padded]) for name in padded[0]})

    def pack(self) -> dict[str, Tensor]:
        """Tensors alone, as a checkpoint may hold them."""
        return {name: tensor.cpu() for name, tensor in self._tensors().items()}

    def _tensors(self) -> dict[str, Tensor]:
        found: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in found.items() if tensor is not None}
