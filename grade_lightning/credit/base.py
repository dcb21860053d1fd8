"""What every credit has: where a step asks it, how far its method's advantage follows a reward, and its slope."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from grade_lightning.advantages import Baseline, group_centred, group_standardised, leave_one_out
from grade_lightning.distributed import Reduce
from grade_lightning.errors import InputError, check_range
from grade_lightning.functional.control_variates import spread_bound
from grade_lightning.records import Experience, Rollout, Scores, TokenStats
from grade_lightning.rewards import Reward
from grade_lightning.stateful import Stateful
from grade_lightning.terms import Aggregate, Term

Share = Callable[[Tensor, Tensor], Tensor]
"""How much of a reward reaches its own completion's advantage, with the group's spread held fixed.

(rewards, advantages), both (P, G) → (P, G).
"""

TokenScores = Callable[[slice], Tensor]
"""Which of the sampled positions → the scores of all tokens there, (m, V), or the same ones for all, (V,)."""


class Credit(Stateful, Term):
    """A policy gradient with less noise and the same mean: what is known of a completion is taken off its advantages.

    With advantages that are differences of rewards the mean is exactly that of the method in the first step on a batch.

    Args:
        decay: of the moving averages, in batches.
    """

    needs_gradient: ClassVar[bool] = False
    """Whether the reward must have one."""
    first_slope: ClassVar[float] = 1.0
    """η before rewards were seen beside their prediction."""

    def __init__(self, decay: float = 0.9) -> None:
        check_range("[0, 1)", "credit", decay=decay)
        self.decay = decay
        self.aggregate: Aggregate | None = None
        self.share: Share | None = None
        self._fit = torch.zeros(3, dtype=torch.float64)

    def attach(self, advantage: Any, aggregate: Aggregate, name: str) -> None:
        """Take the method's weights of tokens, and how far its advantage follows a reward.

        Raises:
            InputError: that is not known of this advantage.
        """
        self.aggregate = self.aggregate or aggregate
        self.share = _share_of(advantage, name)

    def check(self, reward: Reward) -> None:
        """Check, of a reward that was loaded, that it gives what is needed.

        Raises:
            InputError: it does not.
        """

    def begin(self, reward: Reward, rollout: Rollout, learns: bool) -> Callable[[], Scores]:
        """Begin to score; what is returned waits for the scores.

        Args:
            reward: what is maximised.
            rollout: what it reads.
            learns: whether :meth:`look` is going to see the scores.
        """
        return partial(reward.pathwise, rollout) if learns and self.needs_gradient else reward.begin(rollout)

    def look(self, scores: Scores, rollout: Rollout, table: Tensor) -> Scores:
        """See a part of a batch when it is scored; returns the scores without adjoints.

        Args:
            scores: with adjoints, if there is a gradient to be had.
            rollout: what was scored.
            table: the policy's embeddings, (V, width).
        """
        return replace(scores, adjoints=[])

    def scores(self, rollout: Rollout) -> TokenScores | None:
        """Scores s at the sampled positions of a rollout, of which the pass is to measure δ; None: of nothing."""
        return None

    def adjust(self, seen: Experience, advantages: Tensor) -> Tensor:
        """Change the advantages of tokens, (B, T)."""
        return advantages

    def shared(self, seen: Experience, advantages: Tensor, weights: Tensor | None = None) -> Experience:
        """Keep what the term of the loss needs.

        Args:
            seen: the whole batch.
            advantages: of its tokens, without weights, (B, T).
            weights: what advantages are multiplied by, (B, T).
        """
        return seen

    @abstractmethod
    def products(self, seen: Experience) -> Tensor | None:
        """Σ d r, Σ d² and Σ r², (3,), of rewards r and what they are predicted by, d; None: nothing was predicted."""

    def observe(self, seen: Experience, reduce: Reduce) -> None:
        """Move the fit by this batch."""
        own = self.products(seen)
        if own is not None:
            self._fit = self.decay * self._fit + reduce.sum(own.double()).cpu()

    @property
    def slope(self) -> float:
        """η: the slope of rewards on their prediction in the batches so far."""
        along, size, _ = self._fit.tolist()
        return along / size if size > 0 else self.first_slope

    def fitted(self) -> dict[str, Tensor]:
        """η, and ρ²: the share of the rewards' variance that is predicted."""
        along, size, whole = self._fit.tolist()
        share = along**2 / (size * whole) if size * whole > 0 else 0.0
        return {"credit_slope": torch.tensor(self.slope), "credit_r2": torch.tensor(share)}

    def share_of(self, seen: Experience, advantages: Tensor, taken: Tensor, mask: Tensor) -> Tensor:
        """How much of a completion's reward, and of what is taken off it, reaches its advantage, (B, 1).

        Args:
            seen: the whole batch.
            advantages: of its tokens, without weights, (B, T).
            taken: what is taken off at each token, or at one place, (B, T) or (B, 1).
            mask: where.
        """
        assert self.share is not None
        layout, places = seen.rollout.layout, seen.rollout.sampled.long().argmax(-1, keepdim=True)
        first = advantages.gather(1, places).squeeze(1)
        share = layout.rows(self.share(layout.table(seen.rewards), layout.table(first)))
        if self.share is _standardised:
            share = share * spread_bound(seen.rewards, taken, mask, layout.row).to(share)
        return share.unsqueeze(1)

    def __call__(self, seen: Experience, now: TokenStats, reduce: Reduce) -> tuple[Tensor, dict[str, Tensor]]:
        """Nothing but what is logged."""
        return now.logps.new_zeros(()), {name: value.to(now.logps) for name, value in self.fitted().items()}

    def state_dict(self) -> dict[str, Any]:
        """The fit."""
        return {"fit": self._fit}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it."""
        self._fit = state["fit"]


def _share_of(advantage: Any, name: str) -> Share:
    if advantage is leave_one_out or type(advantage) is Baseline:
        least = 2 if advantage is leave_one_out else 1
        return lambda rewards, _: (_answered(rewards) >= least).to(rewards).expand_as(rewards)
    if advantage is group_centred:
        return lambda rewards, _: (1 - 1 / _answered(rewards).clamp(min=1)).expand_as(rewards)
    if advantage is group_standardised:
        return _standardised
    raise InputError(
        f"credit: how far the advantage of {name} follows a reward is not known; leave it out, or use RLOO, Reinforce, "
        "DrGRPO or GRPO"
    )


def _standardised(rewards: Tensor, advantages: Tensor) -> Tensor:
    """(1 − 1 / G) times what a difference of rewards is worth in its group."""
    r = (rewards - rewards.nanmean(-1, keepdim=True)).nan_to_num(nan=0.0)
    slope = (advantages.nan_to_num(nan=0.0) * r).sum(-1, keepdim=True) / r.square().sum(-1, keepdim=True)
    share = (1 - 1 / _answered(rewards).clamp(min=1)) * slope.nan_to_num(0.0, 0.0, 0.0)
    return share.expand_as(rewards)


def _answered(rewards: Tensor) -> Tensor:
    return (~rewards.isnan()).to(rewards).sum(-1, keepdim=True)


def groups_of(seen: Experience) -> Tensor:
    """The prompt of each completion; where each prompt has one, all are of one group."""
    layout = seen.rollout.layout
    return torch.zeros_like(layout.row) if layout.shape[1] == 1 else layout.row
