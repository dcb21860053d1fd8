"""Credit: a control variate for policy gradients, of the tokens' worth or of what was known before them."""

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
from grade_lightning.functional.advantages import discounted_returns, gae, off_others
from grade_lightning.functional.control_variates import deviations, fit, token_scores
from grade_lightning.functional.replay import Adjoint
from grade_lightning.functional.sequences import last_token
from grade_lightning.records import Experience, Rollout, Scores, TokenStats
from grade_lightning.rewards import Reward
from grade_lightning.stateful import Stateful
from grade_lightning.terms import Aggregate, Term

COLUMN = "expected_score"
"""Σ_v π(v) s(v) of each position, in the statistics of a pass."""


Share = Callable[[Tensor, Tensor], Tensor]
"""How much of a reward reaches its own completion's advantage, with the group's spread held fixed.

(rewards, advantages), both (P, G) → (P, G).
"""


class Credit(Stateful, Term):
    """A policy gradient with less noise and the same mean: what is known of a completion is taken off its advantages.

    With advantages that are differences of rewards the mean is exactly that of the method in the first step on a batch.

    Args:
        decay: of the moving averages, in batches.
    """

    needs_gradient: ClassVar[bool] = False
    """Whether the reward must have one."""

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

    def scores(self) -> Tensor | None:
        """s, (V,), of which the pass is to measure the expected value; None: of nothing."""
        return None

    def take_off(self, seen: Experience) -> Experience:
        """Change the rewards before the advantages are made of them."""
        return seen

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
        """η: the slope of rewards on their prediction in the batches so far; 1 before there are any."""
        along, size, _ = self._fit.tolist()
        return along / size if size > 0 else 1.0

    def fitted(self) -> dict[str, Tensor]:
        """η, and ρ²: the share of the rewards' variance that is predicted."""
        along, size, whole = self._fit.tolist()
        share = along**2 / (size * whole) if size * whole > 0 else 0.0
        return {"credit_slope": torch.tensor(self.slope), "credit_r2": torch.tensor(share)}

    def share_of(self, seen: Experience, advantages: Tensor) -> Tensor:
        """How much of a completion's reward reaches its advantage, (B, 1).

        Args:
            seen: the whole batch.
            advantages: of its tokens, without weights, (B, T).
        """
        assert self.share is not None
        layout, places = seen.rollout.layout, seen.rollout.sampled.long().argmax(-1, keepdim=True)
        first = advantages.gather(1, places).squeeze(1)
        return layout.rows(self.share(layout.table(seen.rewards), layout.table(first))).unsqueeze(1)

    def __call__(self, seen: Experience, now: TokenStats, reduce: Reduce) -> tuple[Tensor, dict[str, Tensor]]:
        """Nothing but what is logged."""
        return now.logps.new_zeros(()), {name: value.to(now.logps) for name, value in self.fitted().items()}

    def state_dict(self) -> dict[str, Any]:
        """The fit."""
        return {"fit": self._fit}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it."""
        self._fit = state["fit"]


class PrefixCredit(Credit):
    """The baseline of a token is what the reward says of the text before it: credit for what its own token did.

    The reward of the beginning of a text is known without a further pass where the reward is a causal network. At
    position t it is V_t, and V_0 that of the prompt. With η the slope of rewards on V_t − V_0 within a prompt,

        A_t = R − η (V_t − V_0), less the mean of the same over the prompt's other completions.

    V_t depends on earlier tokens alone, so the mean of the gradient is that of the method, however badly it predicts.

    Args:
        lam: λ of generalised advantage estimates, of which V_t is the value. Below 1 the value is trusted beyond what
            can be proven: less noise, and a bias.
        decay: of the moving averages, in batches.

    References:
        | Baselines of states: Policy Gradient Methods for Reinforcement Learning with Function Approximation (Sutton et
          al., 1999), https://proceedings.neurips.cc/paper/1999/hash/464d828b85b0bed98e80ade0a5c43b0f-Abstract.html
        | λ: High-Dimensional Continuous Control Using Generalized Advantage Estimation (Schulman et al., 2015),
          https://arxiv.org/abs/1506.02438
        | The reward's own scores of beginnings as the value are ours.
    """

    def __init__(self, lam: float = 1.0, decay: float = 0.98) -> None:
        super().__init__(decay)
        check_range("[0, 1]", "credit", lam=lam)
        self.lam = lam

    def check(self, reward: Reward) -> None:
        """It must score the beginnings of texts."""
        if not reward.reads_prefixes:
            reward.with_prefixes(None)  # type: ignore[arg-type]  # says what to do instead

    def begin(self, reward: Reward, rollout: Rollout, learns: bool) -> Callable[[], Scores]:
        """With the reward of what stands before each token."""
        return partial(reward.with_prefixes, rollout)

    def adjust(self, seen: Experience, advantages: Tensor) -> Tensor:
        """Less what was known before each token."""
        start, values = self._values(seen)
        values, mask = self.slope * values, seen.mask
        at_end = last_token(mask) * (seen.rewards.nan_to_num(nan=0.0).unsqueeze(1) - start)
        known = discounted_returns(at_end, mask) - gae(at_end, values, mask, lam=self.lam)
        return advantages - self.share_of(seen, advantages) * off_others(known, mask, _groups(seen))

    def products(self, seen: Experience) -> Tensor:
        """Over all tokens, rewards and values less those of the prompt's other completions."""
        (_, values), mask, groups = self._values(seen), seen.mask, _groups(seen)
        rewards = seen.rewards.nan_to_num(nan=0.0).unsqueeze(1).expand_as(values)
        alone = off_others(mask.to(values), mask, groups)  # 1 where no other completion has the position
        r, d = (off_others(x, mask, groups) * (1 - alone) for x in (rewards, values))
        return torch.stack([(d * r).sum(), d.square().sum(), r.square().sum()])

    def _values(self, seen: Experience) -> tuple[Tensor, Tensor]:
        """V_0, (B, 1), and V_t − V_0, (B, T)."""
        assert seen.scores.prefixes is not None
        found = seen.scores.prefixes.nan_to_num(0.0, 0.0, 0.0)
        start = found.gather(1, seen.rollout.sampled.long().argmax(-1, keepdim=True))
        return start, found - start


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


def _groups(seen: Experience) -> Tensor:
    """The prompt of each completion; where each prompt has one, all are of one group."""
    layout = seen.rollout.layout
    return torch.zeros_like(layout.row) if layout.shape[1] == 1 else layout.row


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
