"""GRADE: the reward's gradient flows through soft tokens, and so does the reward."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.profiler import record_function

from grade_lightning.errors import InputError, check_range
from grade_lightning.functional import divergences, sequences
from grade_lightning.modules import AlignmentModule
from grade_lightning.policies import PolicyLike
from grade_lightning.records import Experience, Prompts, RelaxedRollout, Scores, StepOutput, TokenStats
from grade_lightning.rewards import RewardLike
from grade_lightning.rollouts import RelaxedEngine, Sampler
from grade_lightning.schedules import Linear, Schedule


@dataclass(kw_only=True)
class RelaxedExperience(Experience):
    """Soft completions and their scores. `rollout` and `scores` have no graph, so that what is logged holds none."""

    relaxed: RelaxedRollout
    reward: Tensor
    """(B,), with graph."""


class Grade(AlignmentModule):
    r"""Maximise reward − β KL(π‖π_ref) by backpropagation through Gumbel-softmax tokens.

    In training the policy, the reward and the reference all read soft tokens, and the gradient is the true one of this
    relaxed objective: through every later step (:mod:`grade_lightning.rollouts.relaxed`), through the policy's
    distributions and through the inputs of both networks. `train/reward` and `train/kl` are those of the soft tokens;
    validation and test sample ordinary ones.

    Args:
        policy: the language model.
        reward: a differentiable reward of the policy's vocabulary; of another through :class:`.TranslatedReward`.
        judges: further rewards that are logged and never trained on.
        sampler: how tokens are drawn; its top-k, if it has one, is the support of the soft tokens.
        top_k: the support otherwise, of soft tokens alone: evaluation samples as it does for every method. None: the
            whole vocabulary.
        tau: temperature τ of the soft tokens, a schedule over the run; the paper's line from 2.0 to 0.5 by default.
        beta: coefficient β of the exact KL, in reward per nat.
        block: sampling steps whose activations are in memory at a time; fewer need less memory. All of them
            (`sampler.max_new_tokens`) are fastest: no step is computed twice.
        optimizer: any torch optimizer by class path.
        lr_scheduler: any torch scheduler; a straight line to zero over the run by default.

    References:
        | GRADE: Replacing Policy Gradients with Backpropagation for LLM Alignment (Nel, 2025),
          https://arxiv.org/abs/2601.11574. Departures: a key-value cache; completions end at their end-of-sequence
          token; the KL is part of the loss, of aligned positions, and carries its whole gradient.
    """

    backpropagates_reward = True
    unrolls = True

    def __init__(
        self,
        policy: PolicyLike | None = None,
        reward: RewardLike | None = None,
        judges: list[RewardLike] | None = None,
        sampler: Sampler | None = None,
        top_k: int | None = 256,
        tau: Schedule | None = None,
        beta: float = 0.002,
        block: int = 8,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=3e-4),
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        check_range("[1, inf)", top_k=top_k)
        super().__init__(policy, reward, judges, sampler, beta, optimizer, lr_scheduler)
        own = self.sampler.distribution
        if own.stop:
            raise InputError("--model.sampler.stop: soft tokens form no strings; leave it out, or use GradeSTE")
        self.soft = replace(own, top_k=own.top_k or top_k)
        self.engine = RelaxedEngine(block)
        self.tau = tau or Linear(2.0, 0.5)

    def collect(self, batch: dict[str, Any]) -> RelaxedExperience:
        """Unroll the policy on its own soft tokens, and score these."""
        tau = self.tau(self.global_step, self.total_steps())
        with record_function("sampling"):
            relaxed = self.engine.generate(self.policy, self.soft, Prompts.of(batch), tau)
        with record_function("reward"):
            scores = self.reward.relaxed(relaxed)
        self.meter.count(relaxed)
        detached = Scores(scores.total.detach(), {name: value.detach() for name, value in scores.parts.items()})
        return RelaxedExperience(relaxed.discrete(), detached, self.beta, relaxed=relaxed, reward=scores.total)

    def loss(self, experience: Experience) -> StepOutput:
        """One pass of the reference over the same soft tokens."""
        assert isinstance(experience, RelaxedExperience)
        rollout, reward = experience.relaxed, experience.reward
        tokens, mask = rollout.completion_ids, rollout.completion_mask
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.beta != 0):
            frozen = self.policy.frozen
            soft = rollout.embed(frozen.table())[:, :-1]
            inputs = torch.cat([frozen.embed(rollout.prompt_ids), soft], dim=1)
            reference = frozen.logits(inputs, rollout.mask[:, :-1], tokens.shape[1])
            logps, ref_logps = (self.soft.log_distribution(x) for x in (rollout.logits, reference))
            kl = divergences.categorical_kl(logps, ref_logps)
        objective = reward.nansum() / len(reward) - self.beta * sequences.masked_sum(kl, mask).mean()
        logps, ref_logps, kl = logps.detach(), ref_logps.detach(), kl.detach()
        weights = rollout.weights.detach()
        gap = sequences.masked_sum(1 - weights.amax(-1), mask).sum() / mask.sum()
        own, others = (sequences.token_logps(x, tokens) for x in (logps, ref_logps))
        assert rollout.engine_logps is not None
        stats = TokenStats(rollout.engine_logps, own - others, kl, sequences.entropy(logps), others)
        return StepOutput(-objective, stats, {"tau": kl.new_tensor(rollout.tau), "soft_gap": gap})
