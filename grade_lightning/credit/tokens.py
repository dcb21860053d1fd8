"""Credit by what each token is worth: a direction in a space of embeddings, by gradients or by regression."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from grade_lightning.distributed import Reduce
from grade_lightning.errors import check_range
from grade_lightning.functional.advantages import off_others
from grade_lightning.functional.control_variates import added, fit, ridge_regression, token_scores
from grade_lightning.functional.replay import Adjoint
from grade_lightning.records import Experience, Rollout, Scores, TokenStats

from .base import Credit, TokenScores, groups_of

COLUMN = "deviation"
"""δ of each position, s(x) − Σ_v π(v) s(v), in the statistics of a pass."""


class TokenCredit(Credit):
    """A policy gradient with less noise and the same mean: what is known of tokens is taken off the reward.

    Earlier batches say a direction w in a space of embeddings, which makes a score s(v) = w · e_v of each token v.
    Σ_t δ_t says how much higher a completion's tokens score than the policy was to expect. η Σ_t δ_t is taken off its
    reward, less the mean of the same over the prompt's other completions, and η times the gradient of
    Σ_t Σ_v s(v) π_t(v), which that takes away on average, is added. Where rewards are divided by their spread, what is
    taken off is divided by it, too, and is less in groups in which Σδ spreads more than the rewards do.

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
        self._sums: list[Tensor] = []
        self._new: list[Tensor] = []
        self._scores: Tensor | None = None

    @abstractmethod
    def learn(self, seen: Experience, reduce: Reduce) -> None:
        """Take what was seen into the directions."""

    def move(self, new: list[Tensor], reduce: Reduce) -> None:
        """Move the sums of products by this batch's."""
        self._sums = added([self.decay * old for old in self._sums], [reduce.sum(x) for x in new])

    @abstractmethod
    def directions(self) -> list[Tensor]:
        """In the space of each table, from earlier batches alone; none before there are any."""

    def products(self, seen: Experience) -> Tensor | None:
        """Of completions."""
        if seen.old is None or COLUMN not in seen.old.columns:
            return None
        layout = seen.rollout.layout
        single = layout.shape[1] == 1  # no other completion of the prompt: then those of the other prompts will do
        table = (lambda x: x.unsqueeze(0)) if single else layout.table
        return torch.stack(fit(table(seen.rewards), table(deviations(seen))))

    def observe(self, seen: Experience, reduce: Reduce) -> None:
        """Move the fit and the directions towards this batch's."""
        super().observe(seen, reduce)
        self.learn(seen, reduce)
        self._scores = None

    def scores(self, rollout: Rollout) -> TokenScores | None:
        """s, (V,), the same at all positions and for all steps on a batch; None before there is a direction."""
        if self._scores is None and self._tables and (directions := self.directions()):
            pairs = zip(directions, self._tables, strict=True)
            self._scores = token_scores([Adjoint(w.to(table), table) for w, table in pairs])
        if self._scores is None:
            return None
        found = self._scores = self._scores.to(rollout.ids.device)  # from a checkpoint it may be elsewhere
        return lambda rows: found

    # ---- what is done with it -----------------------------------------------------------------------------------

    def adjust(self, seen: Experience, advantages: Tensor) -> Tensor:
        """Less η Σδ, without the mean of the prompt's other completions."""
        if COLUMN not in seen.old.columns:
            return advantages
        found = deviations(seen).unsqueeze(1)
        off = off_others(found, torch.ones_like(found, dtype=torch.bool), groups_of(seen))
        return advantages - self.coefficient(seen, advantages) * off.to(advantages)

    def coefficient(self, seen: Experience, advantages: Tensor) -> Tensor:
        """η times how much of Σδ reaches the advantage of a completion, (B, 1)."""
        taken = self.slope * deviations(seen).unsqueeze(1)
        return self.slope * self.share_of(seen, advantages, taken, torch.ones_like(taken, dtype=torch.bool))

    def shared(self, seen: Experience, advantages: Tensor, weights: Tensor | None = None) -> Experience:
        """With the weight of the part that is added, at each token.

        Args:
            seen: the whole batch.
            advantages: of its tokens, without weights, (B, T).
            weights: what advantages are multiplied by, (B, T).
        """
        if COLUMN not in seen.old.columns:
            return seen
        share = self.coefficient(seen, advantages)
        return replace(
            seen, extra=seen.extra | {"share": share * (torch.ones_like(advantages) if weights is None else weights)}
        )

    def __call__(self, seen: Experience, now: TokenStats, reduce: Reduce) -> tuple[Tensor, dict[str, Tensor]]:
        """η Σ_t δ_t, as the method weighs its tokens; its gradient is that of −η Σ_t Σ_v s(v) π_t(v)."""
        nothing, figures = super().__call__(seen, now, reduce)
        if COLUMN not in now.columns:
            return nothing, figures
        assert self.aggregate is not None
        weights = self.aggregate(seen.sampled, seen.normalizers) * seen.extra["share"]
        return (weights * now.columns[COLUMN]).masked_fill(~seen.mask, 0).sum(), figures

    def state_dict(self) -> dict[str, Any]:
        """The fit, the sums, and the scores of a window that has begun."""
        return super().state_dict() | {"sums": self._sums, "scores": self._scores}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them; the tables are known when a batch is scored."""
        super().load_state_dict(state)
        self._sums, self._scores = list(state["sums"]), state["scores"]


class PathwiseCredit(TokenCredit):
    """Credit by the reward's gradient at the tokens, averaged over the completions of earlier batches.

    What is added is the straight-through gradient without hops, with the average in the place of the completion's own.
    Its own would not do: that is a bias of half the gradient's size. It needs a reward with a gradient in the policy's
    vocabulary, and a backward pass of it for each batch.

    Args:
        decay: of the moving sums, in batches.

    References:
        See :class:`TokenCredit`; its use with a language model's reward gradients is ours.
    """

    needs_gradient = True
    ridge = 0.0

    def features(self, rollout: Rollout, tables: Sequence[Tensor]) -> Tensor:
        """What says the gradient at each sampled token, (n, k), the first of them 1; here that alone: a mean."""
        return torch.ones(len(rollout.positions), 1, device=rollout.ids.device)

    def look(self, scores: Scores, rollout: Rollout, table: Tensor) -> Scores:
        """Take the products of features with themselves and with the gradients, over the sampled tokens."""
        if scores.adjoints:
            tables = [part.table.detach() for part in scores.adjoints]
            self._tables = self._tables or tables
            found = self.features(rollout, tables)
            gradients = [rollout.take(part.gradient).float().nan_to_num(0.0, 0.0, 0.0) for part in scores.adjoints]
            products = [found.mT @ x for x in (found, *gradients)]
            self._new = added(self._new, products)
        return super().look(scores, rollout, table)

    def learn(self, seen: Experience, reduce: Reduce) -> None:
        """Move the sums by this batch's; not by a window resumed in its middle."""
        if self._new:
            self.move(self._new, reduce)
        self._new = []

    def solutions(self) -> list[Tensor]:
        """Of each table, what features are multiplied by, (k, width); none before there are sums."""
        if not self._sums:
            return []
        squares, *along = self._sums
        variances = squares.diagonal() - squares[0].square() / squares[0, 0].clamp(min=1)
        return [ridge_regression(squares, x, self.ridge * variances) for x in along]

    def directions(self) -> list[Tensor]:
        """The averages."""
        return [x[0] for x in self.solutions()]


class CriticCredit(PathwiseCredit):
    """Credit by a linear critic of derivatives: it says the reward's gradient at a token from the text before it.

    Where :class:`PathwiseCredit` has one direction for all positions, here it is w + A φ_t. φ_t is the place in the
    completion, the embedding of the token before, and the mean of those of all tokens before, the prompt's too. w and
    A come from a ridge regression of the reward's gradients at the tokens of earlier batches. φ_t does not know the
    token, so the mean of the gradient stays what it is, however badly the critic predicts.

    Args:
        decay: of the moving sums, in batches.
        ridge: penalty of each feature, as a share of its variance.

    References:
        See :class:`TokenCredit`. That the critic reads the embeddings of what came before, rather than the policy's
        hidden states, is ours: it predicts as well, or better.
    """

    def __init__(self, decay: float = 0.98, ridge: float = 0.3) -> None:
        super().__init__(decay)
        check_range("(0, inf)", "credit", ridge=ridge)
        self.ridge = ridge
        self._critic: list[Adjoint] = []

    def features(self, rollout: Rollout, tables: Sequence[Tensor]) -> Tensor:
        """1, the place, and of each table the embedding before and the mean of all before."""
        length = rollout.completion_ids.shape[1]
        place = torch.arange(length, device=rollout.ids.device).expand_as(rollout.sampled).unsqueeze(-1) / 32
        parts, before = [torch.ones_like(place), place], slice(-length - 1, -1)
        for table in tables:
            embedded = table[rollout.ids].float() * rollout.mask.unsqueeze(-1)
            count = rollout.mask.cumsum(1).clamp(min=1).unsqueeze(-1)
            parts += [embedded[:, before], (embedded.cumsum(1) / count)[:, before]]
        return rollout.take(torch.cat(parts, -1))

    def scores(self, rollout: Rollout) -> TokenScores | None:
        """s_t, (m, V), the same for all steps on a batch; None before there is a critic."""
        if not self._critic and self._sums and self._tables:
            pairs = zip(self.solutions(), self._tables, strict=True)
            self._critic = [Adjoint(weight, table) for weight, table in pairs]
        if not self._critic:
            return None
        self._critic = [Adjoint(*(x.to(rollout.ids.device) for x in part)) for part in self._critic]
        found = self.features(rollout, [part.table for part in self._critic])
        own = [Adjoint(found.to(part.gradient) @ part.gradient, part.table) for part in self._critic]
        return lambda rows: torch.stack([part(rows) for part in own]).sum(0)

    def observe(self, seen: Experience, reduce: Reduce) -> None:
        """The next batch has a new critic."""
        super().observe(seen, reduce)
        self._critic = []

    def state_dict(self) -> dict[str, Any]:
        """With the critic of a window that has begun."""
        return super().state_dict() | {"critic": [tuple(part) for part in self._critic]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore all."""
        super().load_state_dict(state)
        self._critic = [Adjoint(*part) for part in state["critic"]]


class RegressionCredit(TokenCredit):
    """Credit by a ridge regression of earlier rewards on the tokens' embeddings, for rewards of any kind.

    Rewards less the mean of their prompt are regressed on the sums of the policy's embeddings of the completions'
    tokens, less the same mean. The better it predicts, the less noise is left; however badly, the mean stays.
    Nothing is taken off before a regression was seen to predict the rewards of another batch.

    Args:
        decay: of the moving sums, in batches.
        ridge: penalty, as a share of the mean square of the features.

    References:
        See :class:`TokenCredit`.
    """

    first_slope = 0.0

    def __init__(self, decay: float = 0.98, ridge: float = 1.0) -> None:
        super().__init__(decay)
        check_range("(0, inf)", "credit", ridge=ridge)
        self.ridge = ridge

    def look(self, scores: Scores, rollout: Rollout, table: Tensor) -> Scores:
        """Take the sums of the embeddings."""
        if self._scores is None:
            self._tables = [table]
        embedded = table[rollout.completion_ids].float() * rollout.sampled.unsqueeze(-1)
        self._new.append(embedded.sum(1))
        return super().look(scores, rollout, table)

    def learn(self, seen: Experience, reduce: Reduce) -> None:
        """Add this batch's products; none of a window resumed in its middle, or that lost rows."""
        if not self._new:
            return
        features, layout = torch.cat(self._new), seen.rollout.layout
        self._new = []
        if len(features) != len(seen.rewards):  # all processes reduce, whatever each keeps
            features = features.new_zeros(len(seen.rewards), features.shape[1])
        rewards = seen.rewards
        known = ~rewards.isnan()
        members = torch.nn.functional.one_hot(layout.row).to(features) * known.unsqueeze(1)
        of_group = members @ (members / members.sum(0).clamp(min=1)).mT
        centred = (features - of_group @ features) * known.unsqueeze(1)
        r = rewards.nan_to_num(nan=0.0).to(features)
        self.move([centred.mT @ centred, centred.mT @ (r - of_group @ r)], reduce)

    def directions(self) -> list[Tensor]:
        """The ridge regression's solution."""
        if not self._sums:
            return []
        squares, along = self._sums
        penalties = self.ridge * squares.diagonal().mean().expand(len(squares))
        return [ridge_regression(squares, along.unsqueeze(1), penalties).squeeze(1)]


def deviations(seen: Experience) -> Tensor:
    """Σ_t δ_t of each completion, (B,)."""
    return seen.old.columns[COLUMN].sum(-1)
