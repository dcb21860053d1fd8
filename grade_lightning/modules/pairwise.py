"""What methods share that learn from a judge of pairs: all completions of a prompt, compared with each other."""

from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from grade_lightning.errors import check_range
from grade_lightning.functional import preferences
from grade_lightning.policies import PolicyLike
from grade_lightning.records import Batching, Experience, Prompts, StepOutput
from grade_lightning.rewards import NoReward, PairwiseJudge, RewardLike, RewardPreference
from grade_lightning.rollouts import Sampler

from .alignment import AlignmentModule


class PairwiseModule(AlignmentModule):
    """Pulls the log-ratio of two completions to how much more often one of them beats the policy's own completions.

    Args:
        policy: the language model; the bundled one by default.
        reward: what is measured, and compared where there is no judge of pairs; by default the bundled classifier, or
            none with such a judge.
        judges: further rewards that are logged and never trained on.
        sampler: how completions are drawn. Its temperature is that of the log-probabilities, too.
        beta: how strongly the policy is held to its reference.
        pairwise_judge: P(one ≻ two) of two completions; by default that of their rewards, `RewardPreference`.
        normalize: log-ratios are means over the completion's tokens; else sums.
        num_generations: completions for each prompt, of which all pairs are compared.
        optimizer: any torch optimizer by class path.
        lr_scheduler: any torch scheduler; a straight line to zero over the run by default.
    """

    def __init__(
        self,
        policy: PolicyLike | None = None,
        reward: RewardLike | None = None,
        judges: list[RewardLike] | None = None,
        sampler: Sampler | None = None,
        beta: float = 0.1,
        pairwise_judge: PairwiseJudge | None = None,
        normalize: bool = True,
        num_generations: int = 4,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-4),
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        if pairwise_judge is not None and reward is None:
            reward = NoReward()
        super().__init__(policy, reward, judges, sampler, beta, optimizer, lr_scheduler)
        check_range("(0, inf)", beta=beta)
        check_range("[2, inf)", num_generations=num_generations)
        self.pairwise_judge = pairwise_judge or RewardPreference()
        self.normalize = normalize
        self.num_generations = num_generations

    @property
    def batching(self) -> Batching:
        """Prompts; each micro-batch is a batch of its own."""
        return Batching("prompts", self.num_generations)

    def frozen_modules(self) -> list[nn.Module]:
        """The judge of pairs, too."""
        return [*super().frozen_modules(), self.pairwise_judge]

    def _load(self) -> None:
        super()._load()
        self.pairwise_judge.load(self.tokenizer, self.policy.anatomy.size)
        self.pairwise_judge.requires_grad_(False)

    def collect(self, batch: dict[str, Any]) -> Experience:
        """Completions, with `extra["wins over k"]`: P(i ≻ k) against each completion k of the prompt, (B,)."""
        prompts = Prompts.of(batch)
        counts = torch.full((len(prompts),), self.num_generations)
        rollout = self.draw(prompts.repeat(counts), torch.arange(len(prompts)).repeat_interleave(counts))
        seen = Experience(rollout, self.score(rollout), self.beta)
        table = self.pairwise_judge.table(seen, self.num_generations).flatten(0, 1)
        return replace(seen, extra={f"wins over {k}": wins for k, wins in enumerate(table.unbind(1))})

    def loss(self, experience: Experience) -> StepOutput:
        """Mean over the prompts, and in each over all pairs; 0 for prompts on which the judge abstained."""
        now, mask, size = self.measure(experience.rollout), experience.rollout.sampled, self.num_generations
        table = torch.stack([experience.extra[f"wins over {k}"] for k in range(size)], -1).unflatten(0, (-1, size))
        known = ~table.isnan().any(-1).any(-1)
        table = table.masked_fill(table.isnan(), 0.5)
        sums = now.log_ratio.sum(-1)
        ratios = sums / mask.sum(-1) if self.normalize else sums
        wins = table.mean(-1).to(ratios)
        losses = preferences.online_ipo(ratios.unflatten(0, (-1, size)), wins, self.beta)
        metrics = _ranks(sums.detach().unflatten(0, (-1, size)), table)
        return StepOutput(losses.masked_fill(~known, 0).mean(), now.detach(), metrics)


def _ranks(ratios: Tensor, table: Tensor) -> dict[str, Tensor]:
    """How the policy, compared with its reference, ranks the pairs that the judge decides; both (P, G, …)."""
    gaps = ratios.unsqueeze(2) - ratios.unsqueeze(1)
    decided = table > 0.5  # of each pair one order
    count = decided.sum()
    pairs = len(table) * table.shape[1] * (table.shape[1] - 1) / 2
    return {
        "accuracy": ((gaps > 0) & decided).sum() / count.clamp(min=1),
        "margin": gaps.masked_fill(~decided, 0).sum() / count.clamp(min=1),
        "undecided": 1 - count / pairs,
    }
