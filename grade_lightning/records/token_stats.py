"""What one forward pass says of each token of a rollout."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
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
    """Entropy, nats."""
    ref_logps: Tensor
    """log π_ref of the sampled tokens, at the sampling temperature and untruncated; no graph."""
    values: Tensor | None = None
    """Expected return, from a value head."""
    columns: dict[str, Tensor] = field(default_factory=dict)
    """What parts asked for besides (:mod:`grade_lightning.columns`), by name; no graph."""
    referenced: bool = True
    """Whether the reference was measured, too; else `log_ratio`, `kl` and `ref_logps` are NaN."""

    def map(self, function: Callable[[Tensor], Tensor]) -> "TokenStats":
        """The same with `function` applied to each tensor."""
        columns = {name: function(tensor) for name, tensor in self.columns.items()}
        tensors: dict[str, Any] = {name: function(tensor) for name, tensor in self._tensors().items()}
        return replace(self, columns=columns, **tensors)

    def detach(self) -> "TokenStats":
        """The same without graphs."""
        return self.map(Tensor.detach)

    @classmethod
    def join(cls, parts: "Sequence[TokenStats]", length: int) -> "TokenStats":
        """Those of several rollouts, padded to `length` tokens."""
        padded = [part.map(lambda x: pad(x, (0, length - x.shape[1]))) for part in parts]
        first, tensors = padded[0], [part._tensors() for part in padded]
        columns = {name: torch.cat([part.columns[name] for part in padded]) for name in first.columns}
        whole: dict[str, Any] = {name: torch.cat([part[name] for part in tensors]) for name in tensors[0]}
        return cls(columns=columns, referenced=all(part.referenced for part in padded), **whole)

    def pack(self) -> dict[str, Any]:
        """Tensors and plain values alone, as a checkpoint may hold them."""
        packed = self.map(Tensor.cpu)
        return packed._tensors() | {"columns": packed.columns, "referenced": self.referenced}

    def _tensors(self) -> dict[str, Tensor]:
        found: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}
