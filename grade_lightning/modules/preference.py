"""What the methods that learn from preferences share: pairs of completions, from data or from the reward."""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from grade_lightning.errors import InputError, check_range
from grade_lightning.numerics import wide_numbers
from grade_lightning.policies import Policy, PolicyLike
from grade_lightning.records import Batching, Evaluation, Experience, Prompts, Rollout, StepOutput, TokenStats
from grade_lightning.rewards import NoReward, RewardLike
from grade_lightning.rollouts import Sampler

from .alignment import AlignmentModule
from .given import given_rollout
from .trainable import Stage

Side: TypeAlias = tuple[TokenStats, Tensor]
"""Statistics of the tokens of b completions, 0 outside of the mask, and the mask; each (b, T)."""
PairLoss: TypeAlias = Callable[[Side, Side], Tensor]
"""(preferred completions, the others) → loss of each pair, (b,)."""


def of_sums(loss: Callable[[Tensor, Tensor], Tensor]) -> PairLoss:
    """A loss of two log-ratios log π − log π_ref, each summed over the completion."""
    return lambda chosen, rejected: loss(chosen[0].log_ratio.sum(-1), rejected[0].log_ratio.sum(-1))


def of_means(loss: Callable[[Tensor, Tensor], Tensor]) -> PairLoss:
    """A loss of two log-ratios log π − log π_ref, each the mean over the completion's tokens."""

    def mean(side: Side) -> Tensor:
        stats, mask = side
        return stats.log_ratio.sum(-1) / mask.sum(-1)

    return lambda chosen, rejected: loss(mean(chosen), mean(rejected))


class PreferenceModule(AlignmentModule):
    """Makes the preferred one of two completions likelier than the other, each compared with the reference.

    Args:
        pair_loss: loss of each pair.
        policy: the language model; the bundled one by default.
        reward: ranks the rollouts, and is measured in evaluation; by default the bundled classifier, with pairs from
            data none.
        judges: further rewards that are logged and never trained on.
        sampler: how completions are drawn. Its temperature is that of the log-probabilities, too.
        beta: how strongly the policy is held to its reference.
        pairs: `rollouts`: of each prompt's completions the best and the worst by the reward; `data`: the columns
            `prompt`, `chosen` and `rejected`.
        num_generations: completions for each prompt, for pairs from rollouts.
        optimizer: any torch optimizer by class path.
        lr_scheduler: any torch scheduler; a straight line to zero over the run by default.
    """

    def __init__(
        self,
        pair_loss: PairLoss,
        policy: PolicyLike | None = None,
        reward: RewardLike | None = None,
        judges: list[RewardLike] | None = None,
        sampler: Sampler | None = None,
        beta: float = 0.1,
        pairs: Literal["rollouts", "data"] = "rollouts",
        num_generations: int = 4,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-4),
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        if pairs == "data" and reward is None:
            reward = NoReward()
        super().__init__(policy, reward, judges, sampler, beta, optimizer, lr_scheduler)
        check_range("(0, inf)", beta=beta)
        check_range("[2, inf)", num_generations=num_generations)
        if self.stateful():
            raise InputError(
                f"reward {self.reward.name}: moves with what is sampled, and {type(self).__name__} keeps the best and "
                "the worst of that alone; use it with a policy gradient, GradeSTE or Grade"
            )
        self.pair_loss = pair_loss
        self.pairs = pairs
        self.num_generations = num_generations

    @property
    def batching(self) -> Batching:
        """Pairs of the data, or prompts; each micro-batch is a batch of its own."""
        return Batching("pairs", 2) if self.pairs == "data" else Batching("prompts", self.num_generations)

    def collect(self, batch: dict[str, Any]) -> Experience:
        """Pairs: the first half of the rows is preferred to the second, row by row."""
        if self.pairs == "data":
            rollout = pairs_rollout(batch, self.policy)
            return Experience(rollout, self.reward.score(rollout), self.beta)  # given, not sampled
        prompts = Prompts.of(batch)
        counts = torch.full((len(prompts),), self.num_generations)
        rollout = self.draw(prompts.repeat(counts), torch.arange(len(prompts)).repeat_interleave(counts))
        scores = self.score(rollout)
        grouped = scores.total.unflatten(0, (-1, self.num_generations))
        best, worst = grouped.nan_to_num(nan=-torch.inf).argmax(-1), grouped.nan_to_num(nan=torch.inf).argmin(-1)
        first = torch.arange(len(grouped), device=best.device) * self.num_generations
        rows = torch.cat([first + best, first + worst])
        return Experience(rollout, scores, self.beta).select(rows)

    def loss(self, experience: Experience) -> StepOutput:
        """Mean loss over the pairs; 0 for those of which neither completion is better."""
        rollout = experience.rollout
        now = self.measure(rollout)
        losses, margin = self._compare(rollout, now)
        decided = torch.ones_like(losses, dtype=torch.bool)
        if self.pairs == "rollouts":
            better, worse = experience.scores.total.chunk(2)
            decided = (better > worse) | better.isinf()  # infinite ones must reach the loss, which leaves the step out
        count = decided.sum().clamp(min=1)
        metrics = {
            "accuracy": ((margin > 0) & decided).sum() / count,
            "margin": margin.masked_fill(~decided, 0).sum() / count,
            "undecided": 1 - decided.float().mean(),
        }
        return StepOutput(self.average(losses.masked_fill(~decided, 0), rollout), now.detach(), metrics)

    def average(self, losses: Tensor, rollout: Rollout) -> Tensor:
        """The loss of a step from those of its pairs, (b,)."""
        return losses.mean()

    def _compare(self, rollout: Rollout, now: TokenStats) -> tuple[Tensor, Tensor]:
        """Loss and margin of each pair, (b,) both; the margin without a graph."""
        pairs = len(rollout.ids) // 2
        chosen, rejected = (
            (now.map(lambda x: x[:pairs]), rollout.sampled[:pairs]),
            (now.map(lambda x: x[pairs:]), rollout.sampled[pairs:]),
        )
        margin = (chosen[0].log_ratio.sum(-1) - rejected[0].log_ratio.sum(-1)).detach()
        return self.pair_loss(chosen, rejected), margin

    # ---- evaluation ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    @wide_numbers()
    def measure_pairs(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Loss, accuracy and margin of held-out pairs, means over them."""
        rollout = pairs_rollout(batch, self.policy)
        with self.policy.evaluating():
            losses, margin = self._compare(rollout, self.measure(rollout))
        return {"loss": losses.mean(), "accuracy": (margin > 0).float().mean(), "margin": margin.mean()}

    def _evaluation_step(self, batch: dict[str, Any], stage: Stage, batch_idx: int) -> Evaluation:
        """Completions as for every method, and the pairs, where the batch has any."""
        if "chosen_ids" in batch:
            figures = {f"{stage}/{name}": value for name, value in self.measure_pairs(batch).items()}
            self.log_dict(figures, batch_size=len(batch["input_ids"]), sync_dist=True)
        return super()._evaluation_step(batch, stage, batch_idx)


def pairs_rollout(batch: dict[str, Any], policy: Policy) -> Rollout:
    """Completions of the data in the form of a rollout: the chosen ones, then the rejected ones."""
    return given_rollout(batch, policy, "chosen", "rejected")
