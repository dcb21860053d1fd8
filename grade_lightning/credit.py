"""Credit: a control variate for policy gradients, from what earlier batches said of tokens."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

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


class Credit(Stateful, Term):
    """A policy gradient with less noise and the same mean: what is known of tokens is taken off the reward.

    Earlier batches say a direction w in a space of embeddings, which makes a score s(v) = η w · e_v of each token v.
    How much a completion's tokens score above what the policy was to expect, Σ_t δ_t, is taken off its reward before
    the advantages are made, and the gradient of Σ_t Σ_v s(v) π_t(v), which that takes away on average, is added.

    With advantages that are differences of rewards the mean is exactly that of the method in the first step on a batch,
    whatever the direction; where rewards are divided by their spread, the spread is that of what is left of them.

    Args:
        decay: of the moving averages, in batches.

    References:
        | Trajectory-wise control variates (Cheng, Yan and Boots, 2019), https://arxiv.org/abs/1908.03263
        | Why those of single actions gain nothing: The Mirage of Action-Dependent Baselines (Tucker et al., 2018),
          https://arxiv.org/abs/1802.10031
    """

    needs_gradient: ClassVar[bool] = False
    """Whether the reward must have one."""

    def __init__(self, decay: float = 0.9) -> None:
        check_range("[0, 1)", "credit", decay=decay)
        self.decay = decay
        self.aggregate: Aggregate | None = None
        self.share: Share | None = None
        self._fit = torch.zeros(3, dtype=torch.float64)
        self._tables: list[Tensor] = []
        self._scores: Tensor | None = None

    def attach(self, advantage: Any, aggregate: Aggregate, name: str) -> None:
        """Take the method's weights of tokens, and how far its advantage follows a reward.

        Raises:
            InputError: that is not known of this advantage.
        """
        self.aggregate = self.aggregate or aggregate
        self.share = _share_of(advantage, name)

    # ---- what is learned of rewards -----------------------------------------------------------------------------

    @abstractmethod
    def look(self, scores: Scores, rollout: Rollout, table: Tensor) -> Scores:
        """See a part of a batch when it is scored; returns the scores without adjoints.

        Args:
            scores: with adjoints, if there is a gradient to be had.
            rollout: what was scored.
            table: the policy's embeddings, (V, width).
        """

    @abstractmethod
    def learn(self, seen: Experience, reduce: Reduce) -> None:
        """Take what was seen into the directions."""

    @abstractmethod
    def directions(self) -> list[Tensor]:
        """In the space of each table, from earlier batches alone; none before there are any."""

    def observe(self, seen: Experience, reduce: Reduce) -> None:
        """Move the fit and the directions towards this batch's."""
        if "deviation" in seen.extra:
            layout = seen.rollout.layout
            single = layout.shape[1] == 1  # no other completion of the prompt: then those of the other prompts will do
            table = (lambda x: x.unsqueeze(0)) if single else layout.table
            own = torch.stack(fit(table(seen.extra["reward"]), table(seen.extra["deviation"]))).double()
            self._fit = self.decay * self._fit + reduce.sum(own).cpu()
        self.learn(seen, reduce)
        self._scores = None

    @property
    def slope(self) -> float:
        """η: the slope of rewards on deviations in the batches so far; 1 before there are any."""
        along, size, _ = self._fit.tolist()
        return along / size if size > 0 else 1.0

    def fitted(self) -> dict[str, Tensor]:
        """η, and ρ²: the share of the rewards' variance that Σδ explains."""
        along, size, whole = self._fit.tolist()
        share = along**2 / (size * whole) if size * whole > 0 else 0.0
        return {"credit_slope": torch.tensor(self.slope), "credit_r2": torch.tensor(share)}

    def scores(self) -> Tensor | None:
        """s, (V,), the same for all steps on a batch; None before there is a direction."""
        directions = self.directions()
        if self._scores is None and directions and self._tables:
            pairs = zip(directions, self._tables, strict=True)
            self._scores = self.slope * token_scores([Adjoint(w.to(table), table) for w, table in pairs])
        return self._scores

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
        figures = {name: value.to(now.logps) for name, value in self.fitted().items()}
        if COLUMN not in now.columns:
            return now.logps.new_zeros(()), figures
        assert self.aggregate is not None
        weights = self.aggregate(seen.sampled, seen.normalizers) * seen.extra["share"]
        return -(weights * now.columns[COLUMN]).masked_fill(~seen.mask, 0).sum(), figures

    def state_dict(self) -> dict[str, Any]:
        """The fit, and the scores of a window that has begun."""
        return {"fit": self._fit, "scores": self._scores}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore both; the tables are known when a batch is scored."""
        self._fit, self._scores = state["fit"], state["scores"]


class PathwiseCredit(Credit):
    """Credit by the reward's gradient at the tokens, averaged over the completions of earlier batches.

    What is added is the straight-through gradient without hops, with the average in the place of the completion's own.
    Its own would not do: that is a bias of half the gradient's size. It needs a reward with a gradient in the policy's
    vocabulary, and a backward pass of it for each batch.

    Args:
        decay: of the moving averages, in batches.

    References:
        See :class:`Credit`; its use with a language model's reward gradients is ours.
    """

    needs_gradient = True

    def __init__(self, decay: float = 0.9) -> None:
        super().__init__(decay)
        self._directions: list[Tensor] = []
        self._new: list[Tensor] = []
        self._tokens = 0.0

    def look(self, scores: Scores, rollout: Rollout, table: Tensor) -> Scores:
        """Take the sum of the gradients at sampled tokens."""
        if scores.adjoints and not self._new:
            self._tables = [part.table for part in scores.adjoints]
            self._new = [torch.zeros_like(part.table[0], dtype=torch.float32) for part in scores.adjoints]
        for total, part in zip(self._new, scores.adjoints, strict=True):
            total += rollout.take(part.gradient).float().nan_to_num(0.0, 0.0, 0.0).sum(0)
        self._tokens += len(rollout.positions)
        return Scores(scores.total, scores.parts, per_token=scores.per_token)

    def learn(self, seen: Experience, reduce: Reduce) -> None:
        """Move the average towards this batch's mean over its tokens; not by a window resumed in its middle."""
        if not self._new:
            return
        counts = reduce.sum(torch.tensor([self._tokens], device=seen.rewards.device))
        new = [reduce.sum(total) / counts.clamp(min=1).to(total) for total in self._new]
        if self._directions:
            new = [self.decay * old + (1 - self.decay) * x for old, x in zip(self._directions, new, strict=True)]
        self._directions, self._new, self._tokens = new, [], 0.0

    def directions(self) -> list[Tensor]:
        """The averages."""
        return self._directions

    def state_dict(self) -> dict[str, Any]:
        """With the averages."""
        return super().state_dict() | {"directions": self._directions}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore both."""
        super().load_state_dict(state)
        self._directions = list(state["directions"])


class RegressionCredit(Credit):
    """Credit by a ridge regression of earlier rewards on the tokens' embeddings, for rewards of any kind.

    Rewards less the mean of their prompt are regressed on the sums of the policy's embeddings of the completions'
    tokens, less the same mean. The better it predicts, the less noise is left; however badly, the mean stays.

    Args:
        decay: of the moving sums, in batches.
        ridge: penalty, as a share of the mean square of the features.

    References:
        See :class:`Credit`.
    """

    def __init__(self, decay: float = 0.98, ridge: float = 1.0) -> None:
        super().__init__(decay)
        check_range("(0, inf)", "credit", ridge=ridge)
        self.ridge = ridge
        self._squares: Tensor | None = None
        self._along: Tensor | None = None
        self._sums: list[Tensor] = []

    def look(self, scores: Scores, rollout: Rollout, table: Tensor) -> Scores:
        """Take the sums of the embeddings."""
        if self._scores is None:
            self._tables = [table]
        embedded = table[rollout.completion_ids].float() * rollout.sampled.unsqueeze(-1)
        self._sums.append(embedded.sum(1))
        return Scores(scores.total, scores.parts, per_token=scores.per_token)

    def learn(self, seen: Experience, reduce: Reduce) -> None:
        """Add this batch's products; none of a window resumed in its middle, or that lost rows."""
        if not self._sums:
            return
        features, layout = torch.cat(self._sums), seen.rollout.layout
        self._sums = []
        if len(features) != len(seen.rewards):  # all processes reduce, whatever each keeps
            features = features.new_zeros(len(seen.rewards), features.shape[1])
        rewards = seen.extra.get("reward", seen.rewards)
        known = ~rewards.isnan()
        members = torch.nn.functional.one_hot(layout.row).to(features) * known.unsqueeze(1)
        of_group = members @ (members / members.sum(0).clamp(min=1)).mT
        centred = (features - of_group @ features) * known.unsqueeze(1)
        r = rewards.nan_to_num(nan=0.0).to(features)
        squares, along = reduce.sum(centred.mT @ centred), reduce.sum(centred.mT @ (r - of_group @ r))
        self._squares = squares if self._squares is None else self.decay * self._squares + squares
        self._along = along if self._along is None else self.decay * self._along + along

    def directions(self) -> list[Tensor]:
        """The ridge regression's solution."""
        if self._squares is None or self._along is None:
            return []
        penalty = self.ridge * self._squares.diagonal().mean().clamp(min=1e-12)
        system = self._squares + penalty * torch.eye(len(self._squares), device=self._squares.device)
        return [torch.linalg.solve(system.double(), self._along.double()).float()]

    def state_dict(self) -> dict[str, Any]:
        """With the moving sums."""
        return super().state_dict() | {"squares": self._squares, "along": self._along}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore both."""
        super().load_state_dict(state)
        self._squares, self._along = state["squares"], state["along"]


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
