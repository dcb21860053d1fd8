"""Credit: a control variate for policy gradients, from the gradients that earlier rewards sent to their tokens."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from grade_lightning.advantages import Baseline, group_centred, group_standardised, leave_one_out
from grade_lightning.distributed import Reduce
from grade_lightning.errors import InputError, check_range
from grade_lightning.functional.control_variates import deviations, fit, token_scores
from grade_lightning.functional.replay import Adjoint
from grade_lightning.records import Experience, Rollout, Scores, TokenStats
from grade_lightning.stateful import Stateful
from grade_lightning.terms import Aggregate, Term

COLUMN = "expected_score"
"""Σ_v π(v) s(v) of each position, in the statistics of a pass."""


Share = Callable[[Tensor, Tensor], Tensor]
"""How much of a reward reaches its own completion's advantage, with the group's spread held fixed.

(rewards, advantages), both (P, G) → (P, G).
"""


class PathwiseCredit(Stateful, Term):
    """A policy gradient with less noise and the same mean: what a reward's gradient predicts is taken off the reward.

    The gradient of the reward at a token, averaged over the completions of earlier batches, is a direction w in the
    reward's embeddings, and makes a score s(v) = η w · e_v of each token v. How much a completion's tokens score above
    what the policy was to expect, Σ_t δ_t, is taken off its reward before the advantages are made, and the gradient of
    Σ_t Σ_v s(v) π_t(v), which that takes away on average, is added: the straight-through gradient without hops, with w
    in the place of the completion's own. Its own would not do: that is a bias of half the gradient's size.

    With advantages that are differences of rewards the mean is exactly that of the method in the first step on a batch;
    where rewards are divided by their spread, the spread is that of what is left of them. It needs a reward with a
    gradient in the policy's vocabulary, and a backward pass of it for each batch.

    Args:
        decay: of the moving averages, in batches.

    References:
        | Trajectory-wise control variates (Cheng, Yan and Boots, 2019), https://arxiv.org/abs/1908.03263
        | Why those of single actions gain nothing: The Mirage of Action-Dependent Baselines (Tucker et al., 2018),
          https://arxiv.org/abs/1802.10031
    """

    def __init__(self, decay: float = 0.9) -> None:
        check_range("[0, 1)", "credit", decay=decay)
        self.decay = decay
        self.aggregate: Aggregate | None = None
        self.share: Share | None = None
        self._directions: list[Tensor] = []
        self._fit = torch.zeros(3, dtype=torch.float64)
        self._tables: list[Tensor] = []
        self._new: list[Tensor] = []
        self._tokens = 0.0

    def attach(self, advantage: Any, aggregate: Aggregate, name: str) -> None:
        """Take the method's weights of tokens, and how far its advantage follows a reward.

        Raises:
            InputError: that is not known of this advantage.
        """
        self.aggregate = self.aggregate or aggregate
        self.share = _share_of(advantage, name)

    # ---- what is learned of rewards -----------------------------------------------------------------------------

    def look(self, scores: Scores, rollout: Rollout) -> Scores:
        """Take the sum of the gradients at sampled tokens; returns the scores without them."""
        if scores.adjoints and not self._new:
            self._tables = [part.table for part in scores.adjoints]
            self._new = [torch.zeros_like(table[0], dtype=torch.float32) for table in self._tables]
        for total, part in zip(self._new, scores.adjoints, strict=True):
            total += rollout.take(part.gradient).float().nan_to_num(0.0, 0.0, 0.0).sum(0)
        self._tokens += len(rollout.positions)
        return Scores(scores.total, scores.parts, per_token=scores.per_token)

    def observe(self, seen: Experience, reduce: Reduce) -> None:
        """Move the directions and the fit towards this batch's."""
        counts = reduce.sum(torch.tensor([self._tokens], device=seen.rewards.device))
        new = [reduce.sum(total) / counts.clamp(min=1).to(total) for total in self._new]
        if COLUMN in seen.old.columns and "deviation" in seen.extra:
            table = seen.rollout.layout.table
            own = torch.stack(fit(table(seen.extra["reward"]), table(seen.extra["deviation"]))).double()
            self._fit = self.decay * self._fit + reduce.sum(own).cpu()
        if self._directions:
            new = [self.decay * old + (1 - self.decay) * x for old, x in zip(self._directions, new, strict=True)]
        self._directions, self._new, self._tokens = new, [], 0.0

    @property
    def slope(self) -> float:
        """η: the slope of rewards on deviations in the batches so far; 1 before there are any."""
        along, size, _ = self._fit.tolist()
        return along / size if size > 0 else 1.0

    def scores(self) -> Tensor | None:
        """s, (V,), from earlier batches alone; None before there are any."""
        if not self._directions or not self._tables:
            return None
        pairs = zip(self._directions, self._tables, strict=True)
        return self.slope * token_scores([Adjoint(w.to(table), table) for w, table in pairs])

    # ---- what is done with it -----------------------------------------------------------------------------------

    def take_off(self, seen: Experience) -> Experience:
        """With rewards less Σδ, and in `extra` what the fit is made of: the rewards, and Σδ without η."""
        scores, rollout, rewards = self.scores(), seen.rollout, seen.rewards
        if scores is None or COLUMN not in seen.old.columns:
            return seen
        expected = seen.old.columns[COLUMN]
        found = deviations(scores, rollout.completion_ids, expected, rollout.sampled).to(rewards)
        extra = seen.extra | {"reward": rewards, "deviation": found / self.slope}
        return replace(seen, rewards=rewards - found, extra=extra)

    def shared(self, seen: Experience, advantages: Tensor, weights: Tensor | None = None) -> Experience:
        """With the weight of the part that is added, at each token.

        Args:
            seen: the whole batch.
            advantages: of its tokens, without weights, (B, T).
            weights: what advantages are multiplied by, (B, T).
        """
        assert self.share is not None
        layout, places = seen.rollout.layout, seen.rollout.sampled.long().argmax(-1, keepdim=True)
        first = advantages.gather(1, places).squeeze(1)
        share = layout.rows(self.share(layout.table(seen.rewards), layout.table(first))).unsqueeze(1)
        return replace(
            seen, extra=seen.extra | {"share": share * (torch.ones_like(advantages) if weights is None else weights)}
        )

    def __call__(self, seen: Experience, now: TokenStats, reduce: Reduce) -> tuple[Tensor, dict[str, Tensor]]:
        """−Σ_t Σ_v s(v) π_t(v), as the method weighs its tokens."""
        along, size, whole = self._fit.tolist()
        figures = {
            "credit_slope": now.logps.new_tensor(self.slope),
            "credit_r2": now.logps.new_tensor(along**2 / (size * whole) if size * whole > 0 else 0.0),
        }
        if COLUMN not in now.columns:
            return now.logps.new_zeros(()), figures
        assert self.aggregate is not None
        weights = self.aggregate(seen.sampled, seen.normalizers) * seen.extra["share"]
        return -(weights * now.columns[COLUMN]).masked_fill(~seen.mask, 0).sum(), figures

    # ---- checkpoints --------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Directions and fit."""
        return {"directions": self._directions, "fit": self._fit}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them; the tables are known when the reward is loaded."""
        self._directions, self._fit = list(state["directions"]), state["fit"]


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
