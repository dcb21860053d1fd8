"""A reward that is maximised while others keep within bounds."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from grade_lightning.distributed import Reduce
from grade_lightning.errors import InputError, check_range
from grade_lightning.functional.duals import ascended
from grade_lightning.functional.sequences import last_token
from grade_lightning.records import Experience, Rollout, Scores, unique_name
from grade_lightning.rewards import Reward, WeightedSum
from grade_lightning.stateful import Stateful


@dataclass(frozen=True)
class Constraint:
    """A bound on the mean of a reward, and how fast its multiplier moves.

    Args:
        reward: what is bounded.
        at_most: its mean is to be this or less.
        at_least: its mean is to be this or more; one of both is given.
        rate: by how much the multiplier grows, in reward per unit of this one, for each unit beyond the bound.
        initial: the multiplier at first.
    """

    reward: Reward
    at_most: float | None = None
    at_least: float | None = None
    rate: float = 0.1
    initial: float = 0.0

    def __post_init__(self) -> None:
        """Check the numbers."""
        if (self.at_most is None) == (self.at_least is None):
            raise InputError(f"constraint {self.reward.name}: give one of at_most and at_least")
        check_range("(-inf, inf)", "constraint", at_most=self.at_most, at_least=self.at_least)
        check_range("(0, inf)", "constraint", rate=self.rate)
        check_range("[0, inf)", "constraint", initial=self.initial)

    @property
    def bound(self) -> float:
        """κ."""
        return float(self.at_least if self.at_most is None else self.at_most)  # type: ignore[arg-type]

    @property
    def sign(self) -> float:
        """1 where more is too much, −1 where less is too little."""
        return -1.0 if self.at_most is None else 1.0


class Multipliers(Stateful):
    """λ ≥ 0 of each constraint: it grows while the mean of the reward, over what is trained on, is beyond the bound.

    Args:
        constraints: by name.
    """

    def __init__(self, constraints: dict[str, Constraint]) -> None:
        self.constraints = constraints
        self.values = {name: constraint.initial for name, constraint in constraints.items()}

    def observe(self, seen: Experience, reduce: Reduce) -> None:
        """Move them; one whose reward abstained on everything stays."""
        rewards = torch.stack([seen.scores.parts[name] for name in self.constraints])
        sums = reduce.sum(torch.stack([rewards.nansum(-1), (~rewards.isnan()).sum(-1).to(rewards)]))
        for (name, constraint), mean in zip(self.constraints.items(), (sums[0] / sums[1]).tolist(), strict=True):
            if math.isfinite(mean):
                excess = constraint.sign * (mean - constraint.bound)
                self.values[name] = ascended(self.values[name], excess, constraint.rate)

    def state_dict(self) -> dict[str, Any]:
        """Each by name."""
        return dict(self.values)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore those whose constraints there still are."""
        self.values |= {name: state[name] for name in self.values.keys() & state.keys()}


class Constrained(WeightedSum):
    """R − Σ λ (c − κ): R is maximised, and λ ≥ 0 grows while the mean of the reward c is beyond its bound κ.

    The multipliers λ move once for each optimizer step, or each window of a policy gradient, by the mean over all
    processes; a batch is trained on with those from before. Evaluation shows R alone. A constraint that abstains on a
    completion counts as if it were at its bound. Differentiable when all are.

    Args:
        reward: R.
        constraints: the bounds.

    References:
        | Reward Constrained Policy Optimization (Tessler et al., 2018), https://arxiv.org/abs/1805.11074
    """

    def __init__(self, reward: Reward, constraints: list[Constraint]) -> None:
        super().__init__([reward, *(constraint.reward for constraint in constraints)])
        if not constraints:
            raise InputError("Constrained: there are no constraints; give one or more, or the reward alone")
        named: dict[str, Constraint] = {}
        for constraint in constraints:
            named[unique_name(constraint.reward.name, named)] = constraint
        self.multipliers = Multipliers(named)

    def figures(self) -> dict[str, float]:
        """λ of each constraint."""
        return {f"multiplier/{name}": value for name, value in self.multipliers.values.items()}

    def _add(self, rollout: Rollout, scores: list[Scores]) -> Scores:
        (first, *others), named = scores, self.multipliers.constraints
        held = [-named[name].sign * value for name, value in self.multipliers.values.items()]
        self.weights = [1.0, *(held if self.training else [0.0] * len(held))]
        beyond = [
            _beyond(score, constraint.bound, rollout) for score, constraint in zip(others, named.values(), strict=True)
        ]
        parts = {name: score.total for name, score in zip(named, others, strict=True)}
        for name, value in first.parts.items():
            parts[unique_name(name, parts)] = value
        return replace(super()._add(rollout, [first, *beyond]), parts=parts)


def _beyond(score: Scores, bound: float, rollout: Rollout) -> Scores:
    """Scores less a bound, which is of the last token."""
    spread = score.per_token
    spread = None if spread is None else spread - bound * last_token(rollout.sampled)
    return Scores(score.total - bound, {}, score.adjoints, spread, score.prefixes)
