"""Rewards of a rollout."""

from collections.abc import Container
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from grade_lightning.functional.replay import Adjoint
from grade_lightning.functional.sequences import last_token
from grade_lightning.numerics import widened


@dataclass
class Scores:
    """Rewards of a rollout, in float32 or better whatever computed them; NaN where a reward abstains."""

    total: Tensor
    """(B,)"""
    parts: dict[str, Tensor]
    """Each named reward's own value, (B,)."""
    adjoints: list[Adjoint] = field(default_factory=list)
    """Gradient of `total.nansum()` at the completion's tokens; only from :meth:`Reward.pathwise`."""
    per_token: Tensor | None = None
    """(B, T): how `total` is spread over the tokens; None: all of it is of the last one."""
    prefixes: Tensor | None = None
    """(B, T): the reward of what stands before each token; only from :meth:`Reward.with_prefixes`."""

    def __post_init__(self) -> None:
        """Rewards of a group differ by less than half precision can tell."""
        self.total = widened(self.total)
        self.parts = {name: widened(value) for name, value in self.parts.items()}

    def at_tokens(self, mask: Tensor) -> Tensor:
        """Reward of each token, (B, T); 0 where the reward abstains.

        Args:
            mask: tokens that are trained on, (B, T).
        """
        if self.per_token is not None:
            return self.per_token.masked_fill(self.total.isnan().unsqueeze(1), 0)
        return last_token(mask) * self.total.nan_to_num(nan=0.0).unsqueeze(1)

    def plus(self, name: str, values: Tensor, mask: Tensor) -> "Scores":
        """With a further part, which is of the last token of each completion; without adjoints.

        Args:
            name: of the part.
            values: what it adds, (B,).
            mask: tokens that are trained on, (B, T).
        """
        spread = self.per_token
        spread = None if spread is None else spread + last_token(mask) * values.unsqueeze(1)
        parts = self.parts | {name: values}
        return Scores(self.total + values, parts, per_token=spread, prefixes=self.prefixes)

    def select(self, rows: Tensor, length: int | None = None) -> "Scores":
        """Those of some of the sequences, cut to `length` tokens; without adjoints."""
        per_token, prefixes = (None if x is None else x[rows, :length] for x in (self.per_token, self.prefixes))
        parts = {name: value[rows] for name, value in self.parts.items()}
        return Scores(self.total[rows], parts, per_token=per_token, prefixes=prefixes)

    @classmethod
    def join(cls, scores: "list[Scores]") -> "Scores":
        """Those of several rollouts; without adjoints."""
        parts = {name: torch.cat([score.parts[name] for score in scores]) for name in scores[0].parts}
        per_token = _stacked([score.per_token for score in scores])
        prefixes = _stacked([score.prefixes for score in scores])
        return cls(torch.cat([score.total for score in scores]), parts, per_token=per_token, prefixes=prefixes)

    def pack(self) -> dict[str, Any]:
        """Tensors alone, as a checkpoint may hold them; without adjoints."""
        per_token, prefixes = (None if x is None else x.cpu() for x in (self.per_token, self.prefixes))
        parts = {name: value.cpu() for name, value in self.parts.items()}
        return {"total": self.total.cpu(), "parts": parts, "per_token": per_token, "prefixes": prefixes}


def _stacked(tables: list[Tensor | None]) -> Tensor | None:
    """One below the other, with zeros where one is narrower."""
    known = [table for table in tables if table is not None]
    longest = max((table.shape[1] for table in known), default=0)
    return torch.cat([pad(table, (0, longest - table.shape[1])) for table in known]) if known else None


def unique_name(name: str, taken: Container[str]) -> str:
    """`name`, or `name-2` and so on where it is taken.

    Example:
        >>> unique_name("classifier", {"classifier", "classifier-2"})
        'classifier-3'
    """
    unique, n = name, 1
    while unique in taken:
        n += 1
        unique = f"{name}-{n}"
    return unique
