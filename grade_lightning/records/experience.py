"""Completions and what the stages of a step make of them."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grade_lightning.functional.aggregation import Normalizers
from grade_lightning.functional.sequences import last_token

from .rollout import Rollout
from .scores import Scores
from .token_stats import TokenStats

_LATER: Any = None  # known from a later stage on


@dataclass
class Experience:
    """A rollout on its way through a step. Each stage fills in what it finds and hands it on."""

    rollout: Rollout
    scores: Scores
    beta: float = 0.0
    """Coefficient of the KL while this is trained on, reward per nat."""
    step: int = 0
    """The optimizer step at which it was drawn."""
    run_steps: int = 0
    """Optimizer steps of the whole run; 0: unknown."""
    old: TokenStats = _LATER
    """Statistics of the policy that sampled; known from the stage *measure* on."""
    rewards: Tensor = _LATER
    """(B,): the score, and what counts to the completion as a whole; NaN without a score. From *measure* on."""
    penalties: Tensor = _LATER
    """(B, T): what is added to the reward of single tokens, −β KL. From *measure* on."""
    advantages: Tensor = _LATER
    """(B, T), 0 outside of :attr:`mask`. From *advantage* on."""
    returns: Tensor | None = None
    """(B, T): what a value head is to predict, where there is one."""
    kept: Tensor | None = None
    """(B, T), bool: which of the sampled tokens a selection keeps; None: all."""
    extra: dict[str, Tensor] = field(default_factory=dict)
    """What a method adds of its own, by name: (B,) or (B, T)."""
    normalizers: Normalizers = _LATER
    """What the means of this step's loss are taken over; in the stage *terms*."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Figures of the whole batch, logged in each of its steps."""

    @property
    def sampled(self) -> Tensor:
        """(B, T): tokens that are trained on, as far as the selection goes."""
        return self.rollout.sampled if self.kept is None else self.rollout.sampled & self.kept

    @property
    def mask(self) -> Tensor:
        """(B, T): tokens that are trained on, in completions that have a reward."""
        return self.sampled & ~self.scores.total.isnan().unsqueeze(1)

    def token_rewards(self, baseline: Tensor | float = 0.0) -> Tensor:
        """Reward of each token, (B, T): its penalty, and the completion's reward, at its last token or as it is spread.

        Args:
            baseline: taken off the completion's reward, at its last token.
        """
        rest, spread = self.rewards - baseline, self.scores.per_token
        if spread is not None:
            rest = rest - self.scores.total
        at_end = last_token(self.rollout.sampled) * rest.nan_to_num(nan=0.0).unsqueeze(1)
        rewards = self.penalties + at_end
        return rewards if spread is None else rewards + spread.masked_fill(self.scores.total.isnan().unsqueeze(1), 0)

    @classmethod
    def join(cls, parts: "list[Experience]") -> "Experience":
        """Several rollouts with their scores, before any later stage."""
        if len(parts) == 1:
            return parts[0]
        return cls(Rollout.join([part.rollout for part in parts]), Scores.join([part.scores for part in parts]))

    def select(self, rows: Tensor) -> "Experience":
        """Some of the completions, cut to the longest of them."""
        rollout = self.rollout.select(rows)
        length = rollout.completion_ids.shape[1]
        scores = self.scores.select(rows, length)
        return self._mapped(lambda x: x[rows] if x.dim() == 1 else x[rows, :length], rollout=rollout, scores=scores)

    def pack(self) -> dict[str, Any]:
        """Tensors and plain values alone, as a checkpoint may hold them."""
        packed = self._mapped(Tensor.cpu)
        own = {f.name: value for f in fields(self) if isinstance(value := getattr(packed, f.name), Tensor)}
        metrics = {name: value.cpu() for name, value in self.metrics.items()}
        old = None if self.old is None else self.old.pack()
        whole = {"rollout": self.rollout.pack(), "scores": self.scores.pack(), "beta": self.beta}
        whole |= {"step": self.step, "run_steps": self.run_steps}
        return own | whole | {"old": old, "metrics": metrics, "extra": packed.extra}

    @classmethod
    def unpack(cls, packed: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> "Experience":
        """The inverse of :meth:`pack`."""
        old = None if packed["old"] is None else TokenStats(**packed["old"])
        rollout, scores = Rollout.unpack(packed["rollout"], tokenizer), Scores(**packed["scores"])
        return cls(**packed | {"rollout": rollout, "scores": scores, "old": old})

    def _mapped(self, function: Callable[[Tensor], Tensor], **changes: Any) -> "Experience":
        """The same with `function` applied to each tensor of completions or of tokens."""
        tensors = {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), torch.Tensor)}
        mapped: dict[str, Any] = {name: function(value) for name, value in tensors.items()}
        mapped["extra"] = {name: function(value) for name, value in self.extra.items()}
        if self.old is not None:
            mapped["old"] = self.old.map(function)
        return replace(self, **mapped | changes)
