"""Advantages of tokens, as functions of the experience: the stage between measuring and the loss."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeAlias

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from grade_lightning.columns import Columns
from grade_lightning.distributed import Reduce
from grade_lightning.errors import check_range
from grade_lightning.functional import advantages, smoothing
from grade_lightning.functional.entropy_balance import entropy_weight
from grade_lightning.functional.scores import score_norm
from grade_lightning.functional.token_baseline import optimal_token_baseline
from grade_lightning.functional.virtual import virtual_best
from grade_lightning.memory import PromptMemory
from grade_lightning.records import Experience
from grade_lightning.stateful import Stateful

Advantage: TypeAlias = Callable[[Experience, Reduce], Tensor]
"""(experience, statistics over processes) → advantage of each token, (B, T)."""


def of_completions(values: Tensor, seen: Experience) -> Tensor:
    """The same advantage for all tokens of a completion, less the KL that each token is charged with; (B, T).

    Args:
        values: of each completion, (B,).
        seen: the experience.
    """
    return values.unsqueeze(1) + advantages.discounted_returns(seen.penalties, seen.rollout.sampled)


def grouped(function: Callable[[Tensor], Tensor]) -> Advantage:
    """Advantages of completions from the rewards of their groups, which may be of different sizes.

    Args:
        function: maps a table of rewards (P, G) to advantages (P, G); NaN where there is no reward.

    Example:
        >>> advantage = grouped(advantages.leave_one_out)
    """

    def advantage(seen: Experience, reduce: Reduce) -> Tensor:
        layout = seen.rollout.layout
        return of_completions(layout.rows(function(layout.table(seen.rewards))), seen)

    return advantage


group_centred = grouped(advantages.group_centred)
"""R − the group's mean."""
group_standardised = grouped(advantages.group_standardised)
"""(R − mean) / std of the group."""
leave_one_out = grouped(advantages.leave_one_out)
"""R − the mean of the others of the group."""


def batch_standardised(seen: Experience, reduce: Reduce) -> Tensor:
    """(R − the group's mean) / std over the batch."""
    return grouped(partial(advantages.batch_standardised, total=reduce.sum))(seen, reduce)


class VirtualBest(Stateful):
    """(R − mean) / std of each group with virtual completions of the best reward; it warns of rewards above that.

    Args:
        best: the largest reward that there can be.
        copies: virtual completions of each group.
    """

    def __init__(self, best: float = 1.0, copies: int = 1) -> None:
        check_range("(-inf, inf)", best=best)
        check_range("[0, inf)", copies=copies)
        self.best = best
        self.copies = copies
        self._warned = False

    def __call__(self, seen: Experience, reduce: Reduce) -> Tensor:
        """The same for all tokens of a completion."""
        return grouped(partial(virtual_best, best=self.best, copies=self.copies))(seen, reduce)

    def observe(self, seen: Experience, reduce: Reduce) -> None:
        """Warn, once, of rewards beyond the best."""
        above = int(reduce.sum((seen.scores.total > self.best).sum()))
        if above and self.copies and not self._warned:
            rank_zero_warn(
                f"best = {self.best}: {above} rewards of a batch are above it, so the virtual completion is not the "
                "best one; set best to the reward's maximum"
            )
            self._warned = True


class Smoothed(Stateful):
    """(R − mean) / std of the group, blended with that over all visits of the prompt, which it remembers.

    Args:
        capacity: prompts that are remembered.

    References:
        | DCPO: Dynamic Clipping Policy Optimization (Yang et al., 2025), https://arxiv.org/abs/2509.02333
    """

    def __init__(self, capacity: int = 1_000_000) -> None:
        self.memory = PromptMemory(capacity)
        """Of each prompt the number of visits, and mean and variance of the rewards."""

    def __call__(self, seen: Experience, reduce: Reduce) -> Tensor:
        """The same for all tokens of a completion."""
        known = [self.memory.get(key) for key in seen.rollout.group_keys]
        rows = torch.stack([torch.zeros(3, dtype=torch.float64) if row is None else row for row in known])
        visits, mean, variance = rows.to(seen.rewards.device, seen.rewards.dtype).unbind(-1)
        return grouped(partial(smoothing.smoothed, visits=visits, mean=mean, variance=variance))(seen, reduce)

    def observe(self, seen: Experience, reduce: Reduce) -> None:
        """A visit of each prompt that has a reward."""
        mean, variance = smoothing.group_moments(seen.rollout.layout.table(seen.rewards.double()))
        answered = (~mean.isnan()).cpu()
        keys = [key for key, told in zip(seen.rollout.group_keys, answered.tolist(), strict=True) if told]
        visits = torch.stack([torch.ones_like(mean), mean, variance], dim=1).cpu()
        self.memory.update(keys, visits[answered], _merged_visits, reduce)

    def state_dict(self) -> dict[str, Any]:
        """The memory."""
        return self.memory.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it."""
        self.memory.load_state_dict(state)


def _merged_visits(known: Tensor | None, new: Tensor) -> Tensor:
    if known is None:
        return new
    mean, variance = smoothing.merged_moments(known[0], (known[1], known[2]), (new[1], new[2]))
    return torch.stack([known[0] + 1, mean, variance])


def entropy_balanced(advantage: Advantage, scale: float) -> Advantage:
    """An advantage times 1 + a z, z the entropy of its token, standardised over the batch; not below 0 times.

    Args:
        advantage: of which.
        scale: a.
    """

    def balanced(seen: Experience, reduce: Reduce) -> Tensor:
        surprise = advantages.whiten(seen.old.entropy, seen.mask, reduce.sum)
        return advantage(seen, reduce) * entropy_weight(surprise, scale)

    return balanced


class OptimalTokenBaseline(Columns):
    """R − a baseline of each position, in which the other completions of the prompt count by their noise so far.

    Unbiased, as the mean of the others is. Known exactly it has less variance than the mean reward; estimated from the
    few others of a small group it may have more.

    References:
        | The Optimal Token Baseline (2026), https://arxiv.org/abs/2602.07078
    """

    names = ("score_norm",)

    def columns(self, logps: Tensor, tokens: Tensor, hidden: Tensor) -> Iterable[Tensor]:
        """|e_x − π|² of each token."""
        yield score_norm(logps, tokens)

    def __call__(self, seen: Experience, reduce: Reduce) -> Tensor:
        """Reward less baseline; 0 without a reward, or where no other completion has one."""
        rollout = seen.rollout
        norms = seen.old.columns["score_norm"]
        baseline = optimal_token_baseline(seen.rewards, norms, rollout.sampled, rollout.layout)
        surplus = (seen.rewards.unsqueeze(1) - baseline).nan_to_num(nan=0.0)
        return surplus + of_completions(torch.zeros_like(seen.rewards), seen)


class Baseline(Stateful):
    """A moving average of the rewards of earlier batches; as an advantage, what a reward exceeds it by.

    Args:
        decay: of the average.
    """

    def __init__(self, decay: float = 0.9) -> None:
        check_range("[0, 1]", decay=decay)
        self.decay = decay
        self.average: float | None = None
        """None: nothing was seen yet."""

    def __call__(self, seen: Experience, reduce: Reduce) -> Tensor:
        """Reward less baseline."""
        return of_completions(seen.rewards - self.value(seen.rewards, reduce), seen)

    def value(self, rewards: Tensor, reduce: Reduce) -> Tensor:
        """The average; in the first batch, the mean of `rewards` themselves."""
        return _mean(rewards, reduce) if self.average is None else rewards.new_tensor(self.average)

    def observe(self, seen: Experience, reduce: Reduce) -> None:
        """Move the average towards the batch's mean reward."""
        before = torch.tensor(torch.nan if self.average is None else self.average, dtype=torch.float64)
        moved = advantages.ema(before, _mean(seen.scores.total, reduce).cpu().double(), self.decay)
        if moved.isfinite():
            self.average = float(moved)

    def state_dict(self) -> dict[str, Any]:
        """The average, once there is one."""
        return {} if self.average is None else {"average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it."""
        self.average = state.get("average")


class GAE(Baseline):
    """Generalised advantage estimates from a value head, whitened over the batch.

    The moving average is taken off each reward, so that a value of 0 is right at first. Without it the first updates
    would reward ending early.

    Args:
        gamma: discount.
        lam: λ of the estimates.
        decay: of the moving average.
    """

    def __init__(self, gamma: float = 1.0, lam: float = 0.95, decay: float = 0.9) -> None:
        super().__init__(decay)
        check_range("[0, 1]", gamma=gamma, lam=lam)
        self.gamma = gamma
        self.lam = lam

    def __call__(self, seen: Experience, reduce: Reduce) -> Tensor:
        """Whitened estimates."""
        return advantages.whiten(self.estimates(seen, reduce), seen.mask, reduce.sum)

    def estimates(self, seen: Experience, reduce: Reduce) -> Tensor:
        """The estimates themselves, (B, T)."""
        assert seen.old.values is not None
        baseline = self.value(seen.scores.total, reduce)
        return advantages.gae(seen.token_rewards(baseline), seen.old.values, seen.mask, self.gamma, self.lam)

    def returns(self, seen: Experience, reduce: Reduce) -> Tensor:
        """What the value head is to predict: its own value, corrected by the estimate."""
        assert seen.old.values is not None
        return self.estimates(seen, reduce) + seen.old.values


def whitened_returns(gamma: float = 1.0) -> Advantage:
    """The discounted reward from each token on, whitened over the batch."""

    def advantage(seen: Experience, reduce: Reduce) -> Tensor:
        returns = advantages.discounted_returns(seen.token_rewards(), seen.mask, gamma)
        return advantages.whiten(returns, seen.mask, reduce.sum)

    return advantage


def _mean(rewards: Tensor, reduce: Reduce) -> Tensor:
    """Of all completions that have a reward, on all processes; NaN if there are none."""
    sums = reduce.sum(torch.stack([rewards.nansum(), (~rewards.isnan()).sum().to(rewards.dtype)]))
    return sums[0] / sums[1]
