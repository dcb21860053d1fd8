"""What methods share that learn from completions which are labelled one by one, without pairs."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, TypeAlias

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics.classification import BinaryAUROC

from grade_lightning.errors import InputError, check_range
from grade_lightning.numerics import wide_numbers
from grade_lightning.policies import PolicyLike
from grade_lightning.records import Batching, Evaluation, Experience, Rollout, StepOutput, TokenStats
from grade_lightning.rewards import NoReward, RewardLike
from grade_lightning.rollouts import Sampler

from .alignment import AlignmentModule
from .given import given_rollout
from .trainable import Stage

RowLoss: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(log π − log π_ref summed over each completion, whether it is desirable, z₀) → loss of each, (B,)."""


class UnpairedModule(AlignmentModule):
    """Makes desirable completions likelier and the others less likely, each compared with the reference.

    Args:
        row_loss: loss of each completion.
        policy: the language model; the bundled one by default.
        reward: labels the rollouts, and is measured in evaluation; by default the bundled classifier, with labels of
            the data none.
        judges: further rewards that are logged and never trained on.
        sampler: how completions are drawn. Its temperature is that of the log-probabilities, too.
        beta: how strongly the policy is held to its reference.
        labels: `rollouts`: a sampled completion is desirable if its reward reaches the threshold; `data`: the columns
            `prompt`, `completion` and `label`.
        threshold: of the reward.
        z0: z₀, which the log-ratios are compared with: `mismatched`: the mean log-ratio of completions that belong to
            another prompt; `exact`: the exact KL of what was sampled; `none`: 0.
        optimizer: any torch optimizer by class path.
        lr_scheduler: any torch scheduler; a straight line to zero over the run by default.
    """

    def __init__(
        self,
        row_loss: RowLoss,
        policy: PolicyLike | None = None,
        reward: RewardLike | None = None,
        judges: list[RewardLike] | None = None,
        sampler: Sampler | None = None,
        beta: float = 0.1,
        labels: Literal["rollouts", "data"] = "rollouts",
        threshold: float = 0.5,
        z0: Literal["mismatched", "exact", "none"] = "mismatched",
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-4),
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        if labels == "data" and reward is None:
            reward = NoReward()
        super().__init__(policy, reward, judges, sampler, beta, optimizer, lr_scheduler)
        check_range("(0, inf)", beta=beta)
        check_range("(-inf, inf)", threshold=threshold)
        if labels == "data" and z0 == "exact":
            raise InputError(
                "z0 = exact: is the KL of what the policy samples, and with labels = data nothing is sampled; use "
                "mismatched"
            )
        self.row_loss = row_loss
        self.labels = labels
        self.threshold = threshold
        self.z0 = z0
        self.held_out = nn.ModuleDict({stage: BinaryAUROC() for stage in ("val", "test")})

    @property
    def batching(self) -> Batching:
        """Prompts, with completions of the data or without."""
        return Batching("unpaired" if self.labels == "data" else "prompts", least=2 if self.z0 == "mismatched" else 1)

    def frozen_modules(self) -> list[nn.Module]:
        """The metrics, too."""
        return [*super().frozen_modules(), self.held_out]

    def collect(self, batch: dict[str, Any]) -> Experience:
        """Completions, with `extra["desirable"]`: 1, 0, or NaN where the reward abstained.

        With mismatched ones, `extra["mismatched"]` is the log-ratio of each prompt with another's completion.
        """
        if self.labels == "data":
            rollout = given_rollout(batch, self.policy, "completion")
            seen = Experience(rollout, self.reward.score(rollout), self.beta)
            desirable = batch["desirable"].float()
        else:
            seen = super().collect(batch)
            total = seen.scores.total
            desirable = (total >= self.threshold).float().masked_fill(total.isnan(), torch.nan)
        extra = {"desirable": desirable}
        if self.z0 == "mismatched":
            with torch.no_grad(), self.policy.evaluating():
                extra["mismatched"] = self.measure(mismatched(seen.rollout)).log_ratio.sum(-1)
        return replace(seen, extra=extra)

    def reference_point(self, seen: Experience, now: TokenStats) -> Tensor:
        """z₀ ≥ 0: over the completions of all processes."""
        if self.z0 == "none":
            return now.logps.new_zeros(())
        found = seen.extra["mismatched"] if self.z0 == "mismatched" else now.kl.detach().sum(-1)
        return self.reduce.mean(found.mean()).clamp(min=0)  # not the mean of what each clamps

    def loss(self, experience: Experience) -> StepOutput:
        """Mean loss over the completions; 0 for those on which the reward abstained."""
        rollout, labels = experience.rollout, experience.extra["desirable"]
        now = self.measure(rollout)
        point = self.reference_point(experience, now)
        known, desirable, ratios = ~labels.isnan(), labels == 1, now.log_ratio.sum(-1)
        losses = self.row_loss(ratios, desirable, point).masked_fill(~known, 0)
        metrics = {
            "z0": point,
            "desirable": (desirable & known).sum() / known.sum().clamp(min=1),
            "margin": _mean(ratios.detach(), desirable) - _mean(ratios.detach(), ~desirable & known),
        }
        return StepOutput(losses.mean(), now.detach(), metrics)

    # ---- evaluation ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    @wide_numbers()
    def measure_labelled(self, batch: dict[str, Any]) -> Tensor:
        """Log-ratio of each held-out completion, (B,)."""
        rollout = given_rollout(batch, self.policy, "completion")
        with self.policy.evaluating():
            return self.measure(rollout).log_ratio.sum(-1)

    def _evaluation_step(self, batch: dict[str, Any], stage: Stage, batch_idx: int) -> Evaluation:
        """Completions as for every method, and the labelled ones, where the batch has any."""
        if "desirable" in batch:
            metric = self.held_out[stage]
            assert isinstance(metric, BinaryAUROC)
            metric.update((self.beta * self.measure_labelled(batch)).sigmoid(), batch["desirable"].long())
            self.log(f"{stage}/auroc", metric, batch_size=len(batch["input_ids"]))
        return super()._evaluation_step(batch, stage, batch_idx)


def mismatched(rollout: Rollout) -> Rollout:
    """Each prompt with the completion of the row before it; the first with that of the last."""
    changes: dict[str, Any] = {name: value.roll(1, 0) for name, value in rollout.tokenwise().items()}
    return replace(rollout, **changes | {"engine_logps": None, "groups": None})


def _mean(values: Tensor, chosen: Tensor) -> Tensor:
    """Of those that are chosen; 0 where none is."""
    return values.masked_fill(~chosen, 0).sum() / chosen.sum().clamp(min=1)
