"""Decoupled clip and dynamic sampling policy optimisation."""

from typing import Any

import torch
from torch import Tensor

from grade_lightning.errors import check_range
from grade_lightning.functional import advantages, policy
from grade_lightning.functional.policy import Totals
from grade_lightning.kl import KL
from grade_lightning.policy_gradient import PolicyGradientModule
from grade_lightning.rewards import Scores
from grade_lightning.rollouts import Rollout
from grade_lightning.rows import slice_rows


class DAPO(PolicyGradientModule):
    """GRPO with a higher upper clip, a mean over tokens, prompts that teach something, and a penalty for overlong text.

    Dynamic sampling: a group whose rewards are all equal has no advantage; it is replaced by the group of another
    prompt, of which the data hand out `1 + max_retries` times as many as are needed. What is still uninformative
    after that many rounds stays in.

    Args:
        epsilon_low: the ratio is clipped below at 1 − this.
        epsilon_high: and above at 1 + this.
        max_retries: rounds of sampling for other groups; 0: no dynamic sampling.
        overlong_buffer: over how many tokens before `sampler.max_new_tokens` the penalty grows from 0 to 1; a fifth
            of them by default, as in the paper; 0: no penalty.
        num_generations: completions for each prompt, a group.
        minibatches: optimizer steps for each window.
        kl: the KL to the reference; the paper has none.
        **kwargs: those of :class:`~grade_lightning.policy_gradient.PolicyGradientModule`.

    References:
        | DAPO: An Open-Source LLM Reinforcement Learning System at Scale (Yu et al., 2025),
          https://arxiv.org/abs/2503.14476
    """

    least_generations = 2

    def __init__(
        self,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.28,
        max_retries: int = 2,
        overlong_buffer: int | None = None,
        num_generations: int = 8,
        minibatches: int = 4,
        kl: KL = KL(),
        **kwargs: Any,
    ) -> None:
        super().__init__(num_generations=num_generations, minibatches=minibatches, kl=kl, **kwargs)
        check_range("[0, 1]", epsilon_low=epsilon_low)
        check_range("[0, inf]", epsilon_high=epsilon_high)
        check_range("[0, inf)", max_retries=max_retries, overlong_buffer=overlong_buffer)
        self.epsilon_low = epsilon_low
        self.epsilon_high = epsilon_high
        self.max_retries = max_retries
        self.overlong_buffer = overlong_buffer

    def rows_per_batch(self, batch_size: int) -> int:
        """Prompts of a window, and those to fall back on."""
        return super().rows_per_batch(batch_size) * (1 + self.max_retries)

    def sample(self, batch: dict[str, Any]) -> tuple[Rollout, Scores]:
        """Groups with different rewards, as far as the prompts last."""
        needed, size = max(1, len(batch["input_ids"]) // (1 + self.max_retries)), self.num_generations
        rollouts: list[Rollout] = []
        scores: list[Scores] = []
        informative = torch.zeros(0, dtype=torch.bool)
        while len(rollouts) <= self.max_retries and informative.sum() < needed:
            missing = needed - int(informative.sum())
            rollout, score = super().sample(slice_rows(batch, len(informative), missing))
            differs = advantages.differ(score.total.unflatten(0, (-1, size)))
            informative = torch.cat([informative, differs.cpu()])
            rollouts, scores = [*rollouts, rollout], [*scores, score]
        groups = (~informative).long().argsort(stable=True)[:needed]
        rows = (groups.unsqueeze(1) * size + torch.arange(size)).flatten()
        return self._shaped(Rollout.join(rollouts).select(rows), Scores.join(scores).select(rows))

    def _shaped(self, rollout: Rollout, scores: Scores) -> tuple[Rollout, Scores]:
        longest = self.sampler.max_new_tokens
        buffer = longest // 5 if self.overlong_buffer is None else self.overlong_buffer
        if buffer:
            penalty = advantages.overlong_penalty(rollout.lengths, longest, buffer)
            scores = Scores(scores.total + penalty, scores.parts | {"overlong": penalty})
        return rollout, scores

    def group_advantages(self, rewards: Tensor) -> Tensor:
        """(R − mean) / std of the group."""
        return advantages.group_standardised(rewards)

    def gate(self, ratio: Tensor, advantages: Tensor) -> Tensor:
        """PPO's clip, its bounds apart."""
        return policy.clipped(ratio, advantages, 1 - self.epsilon_low, 1 + self.epsilon_high)

    def aggregate(self, mask: Tensor, totals: Totals) -> Tensor:
        """Mean over all tokens."""
        return policy.token_mean(mask, totals)
