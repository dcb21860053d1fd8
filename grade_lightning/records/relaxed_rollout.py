"""Rollouts of soft tokens."""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from grade_lightning.functional.gumbel import soft_embeddings

from .rollout import Rollout


@dataclass(kw_only=True)
class RelaxedRollout(Rollout):
    """Soft completions with the graph of their making. k tokens in the support of each, V in the vocabulary.

    `completion_ids` are the most heavily weighted tokens; ends, masks and texts are theirs.
    """

    weights: Tensor
    """(B, T, k), float32 or better, with graph: the soft tokens, each summing to 1."""
    indices: Tensor
    """(B, T, k): the token ids that the weights belong to; 0 to V − 1 in order where the support is the vocabulary."""
    logits: Tensor
    """(B, T, V), with graph: the policy's, before temperature and truncation."""
    tau: float
    """Temperature of the relaxation."""

    _TOKENS: ClassVar[tuple[str, ...]] = (*Rollout._TOKENS, "weights", "indices", "logits")

    def embed(self, table: Tensor) -> Tensor:
        """Soft embeddings of the completion by a table (V, width); (B, T, width), with graph."""
        return soft_embeddings(self.weights, self.indices, table)

    def discrete(self) -> Rollout:
        """The completion's hard tokens alone. They were drawn after soft ones, so there are no `engine_logps`."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(Rollout)}
        return Rollout(**fields | {"engine_logps": None})
