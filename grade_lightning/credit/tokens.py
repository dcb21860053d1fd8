"""Credit by what each token is worth: a direction in a space of embeddings, by gradients or by regression."""

from abc import abstractmethod
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from grade_lightning.distributed import Reduce
from grade_lightning.errors import check_range
from grade_lightning.functional.control_variates import deviations, fit, token_scores
from grade_lightning.functional.replay import Adjoint
from grade_lightning.records import Experience, Rollout, Scores, TokenStats

from .base import Credit

COLUMN = "expected_score"
"""Σ_v π(v) s(v) of each position, in the statistics of a pass."""


class TokenCredit(Credit):
    """A policy gradient with less noise and the same mean: what is known of tokens is taken off the reward.

    Earlier batches say a direction w in a space of embeddings, which makes a score s(v) = η w · e_v of each token v.
    How much a completion's tokens score above what the policy was to expect, Σ_t δ_t, is taken off its reward before
    the advantages are made, and the gradient of Σ_t Σ_v s(v) π_t(v), which that takes away on average, is added.
    Where rewards are divided by their spread, the spread is that of what is left of them.

    Args:
        decay: of the moving averages, in batches.

    References:
        | Trajectory-wise control variates (Cheng, Yan and Boots, 2019), https://arxiv.org/abs/1908.03263
        | Why those of single actions gain nothing: The Mirage of Action-Dependent Baselines (Tucker et al., 2018),
          https://arxiv.org/abs/1802.10031
    """

    def __init__(self, decay: float = 0.9) -> None:
        super().__init__(decay)
        self._tables: list[Tensor] = []
        self._scores: Tensor | None = None

    @abstractmethod
    def learn(self, seen: Experience, reduce: Reduce) -> None:
        """Take what was seen into the directions."""

    @abstractmethod
    def directions(self) -> list[Tensor]:
        """In the space of each table, from earlier batches alone; none before there are any."""

    def products(self, seen: Experience) -> Tensor | None:
        """Of completions."""
        if "deviation" not in seen.extra:
            return None
        layout = seen.rollout.layout
        single = layout.shape[1] == 1  # no other completion of the prompt: then those of the other prompts will do
        table = (lambda x: x.unsqueeze(0)) if single else layout.table
        return torch.stack(fit(table(seen.extra["reward"]), table(seen.extra["deviation"])))

    def observe(self, seen: Experience, reduce: Reduce) -> None:
        """Move the fit and the directions towards this batch's."""
        super().observe(seen, reduce)
        self.learn(seen, reduce)
        self._scores = None

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
        share = self.share_of(seen, advantages)
        return replace(
            seen, extra=seen.extra | {"share": share * (torch.ones_like(advantages) if weights is None else weights)}
        )

    def __call__(self, seen: Experience, now: TokenStats, reduce: Reduce) -> tuple[Tensor, dict[str, Tensor]]:
        """−Σ_t Σ_v s(v) π_t(v), as the method weighs its tokens."""
        nothing, figures = super().__call__(seen, now, reduce)
        if COLUMN not in now.columns:
            return nothing, figures
        assert self.aggregate is not None
        weights = self.aggregate(seen.sampled, seen.normalizers) * seen.extra["share"]
        return -(weights * now.columns[COLUMN]).masked_fill(~seen.mask, 0).sum(), figures

    def state_dict(self) -> dict[str, Any]:
        """The fit, and the scores of a window that has begun."""
        return super().state_dict() | {"scores": self._scores}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore both; the tables are known when a batch is scored."""
        super().load_state_dict(state)
        self._scores = state["scores"]


class PathwiseCredit(TokenCredit):
    """Credit by the reward's gradient at the tokens, averaged over the completions of earlier batches.

    What is added is the straight-through gradient without hops, with the average in the place of the completion's own.
    Its own would not do: that is a bias of half the gradient's size. It needs a reward with a gradient in the policy's
    vocabulary, and a backward pass of it for each batch.

    Args:
        decay: of the moving averages, in batches.

    References:
        See :class:`TokenCredit`; its use with a language model's reward gradients is ours.
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
        return super().look(scores, rollout, table)

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


class RegressionCredit(TokenCredit):
    """Credit by a ridge regression of earlier rewards on the tokens' embeddings, for rewards of any kind.

    Rewards less the mean of their prompt are regressed on the sums of the policy's embeddings of the completions'
    tokens, less the same mean. The better it predicts, the less noise is left; however badly, the mean stays.

    Args:
        decay: of the moving sums, in batches.
        ridge: penalty, as a share of the mean square of the features.

    References:
        See :class:`TokenCredit`.
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
        return super().look(scores, rollout, table)

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
