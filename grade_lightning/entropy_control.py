"""Entropy control by temperature: what the policy's entropy was, and at which temperature to look next."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from grade_lightning.columns import Columns
from grade_lightning.distributed import Reduce
from grade_lightning.errors import check_range
from grade_lightning.functional.arbitrary_entropy import entropy_share, reweighted, tempered_log_ratio
from grade_lightning.records import Experience
from grade_lightning.stateful import Stateful
from grade_lightning.terms import mean_entropy


class EntropyControl(Stateful, Columns):
    """A high temperature while the entropy of the latest window is at most the target, else a low one.

    Args:
        target: nats per token.
        high: temperature.
        low: temperature.
    """

    names = ("tempered",)

    def __init__(self, target: float, high: float, low: float) -> None:
        check_range("[0, inf)", target_entropy=target)
        check_range("(0, inf)", temperature_high=high, temperature_low=low)
        self.target, self.high, self.low = target, high, low
        self.entropy = 0.0
        """Of the latest window; 0 before the first."""

    @property
    def temperature(self) -> float:
        """Of now."""
        return self.high if self.entropy <= self.target else self.low

    def columns(self, logps: Tensor, tokens: Tensor, hidden: Tensor) -> Iterable[Tensor]:
        """Log π_T − log π of each token."""
        yield tempered_log_ratio(logps, tokens, self.temperature)

    def reweighted(self, seen: Experience, correct: float, most: float, reduce: Reduce) -> Experience:
        """With advantages in which the tokens of correct completions weigh more, the farther the entropy is off.

        Args:
            seen: with the advantages so far, and :meth:`columns`.
            correct: a completion with this reward or more is correct.
            most: the largest |H_target − H| that counts.
            reduce: statistics over all processes.
        """
        rewards = seen.scores.total
        right = rewards >= correct
        counts = reduce.sum(torch.stack([right.sum(), (~rewards.isnan()).sum()]).to(seen.advantages))
        share = entropy_share(self.entropy, self.target, counts[0] / counts[1].clamp(min=1), most)
        advantages = reweighted(seen.advantages, seen.old.columns["tempered"], right, share)
        return replace(seen, advantages=advantages.masked_fill(~seen.mask, 0))

    def observe(self, seen: Experience, reduce: Reduce) -> None:
        """Remember the entropy, but of completions that were drawn at another temperature."""
        tempered = seen.extra.get("tempered")
        mask = seen.sampled if tempered is None else seen.sampled & ~tempered.bool().unsqueeze(1)
        self.entropy = mean_entropy(seen, reduce, mask)

    def state_dict(self) -> dict[str, Any]:
        """The entropy."""
        return {"entropy": self.entropy}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it."""
        self.entropy = state["entropy"]
