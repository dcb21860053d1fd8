"""GRADE-STE: the reward's gradient flows through the sampled tokens."""

from typing import Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable

from grade_lightning.errors import InputError
from grade_lightning.estimators import StraightThrough, TokenEstimator
from grade_lightning.functional import divergences, sequences
from grade_lightning.functional.replay import Adjoint, next_input_gradient, replay
from grade_lightning.module import AlignmentModule, Experience, StepOutput
from grade_lightning.policies import Policy
from grade_lightning.rewards import Reward
from grade_lightning.rollouts import Sampler
from grade_lightning.schedules import Constant, Schedule


class GradeSTE(AlignmentModule):
    r"""Maximise reward − β KL(π‖π_ref) by backpropagation through the sampled tokens.

    The completions are sampled as usual; their Gumbel noise is restored afterwards, and the gradient of the unrolled
    straight-through sampler is rebuilt in one teacher-forced pass (:mod:`grade_lightning.functional.replay`). With
    `hops="exact"` it is the unrolled gradient itself.

    Args:
        policy: the language model.
        reward: a differentiable reward of the policy's vocabulary.
        judges: further rewards that are logged and never trained on.
        sampler: how completions are drawn. Its top-k restricts the relaxed tokens, too (the paper's k is 256).
        estimator: how a sampled token passes its gradient on. The paper's is `Gumbel`; plain straight-through, the
            default, has less noise and did better on the bundled task.
        hops: how often the adjoint is carried to earlier tokens; `exact` carries it all the way.
        tolerance: stop hopping once the adjoint changes by less than this fraction.
        tau: temperature τ of the relaxed tokens, a schedule over the run.
        beta: coefficient β of the exact KL, in reward per nat.
        kl_prefix: how far the KL's gradient goes: `none`, each position's own distribution; `policy`, also that earlier
            tokens moved the policy's later distributions; `full`, also those of the reference: the true gradient.
        optimizer: any torch optimizer by class path.
        lr_scheduler: any torch scheduler; a straight line to zero over the run by default.

    References:
        | GRADE: Replacing Policy Gradients with Backpropagation for LLM Alignment (Nel, 2025),
          https://arxiv.org/abs/2601.11574. Departures: no Gumbel noise by default; replay instead of unrolling;
          completions end at their end-of-sequence token; the KL is part of the loss.
    """

    backpropagates_reward = True

    def __init__(
        self,
        policy: Policy | None = None,
        reward: Reward | None = None,
        judges: list[Reward] | None = None,
        sampler: Sampler | None = None,
        estimator: TokenEstimator | None = None,
        hops: int | Literal["exact"] = 2,
        tolerance: float = 0.0,
        tau: Schedule | None = None,
        beta: float = 0.002,
        kl_prefix: Literal["none", "policy", "full"] = "none",
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=3e-4),
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(policy, reward, judges, sampler, beta, optimizer, lr_scheduler)
        if hops != "exact" and hops < 0:
            raise InputError(f"hops = {hops}: must be 0 or more, or exact")
        self.estimator = estimator or StraightThrough()
        self.hops = hops
        self.tolerance = tolerance
        self.tau = tau or Constant(1.0)
        self.kl_prefix = kl_prefix

    def loss(self, experience: Experience) -> StepOutput:
        """One replay of the rollout."""
        rollout, scores = experience.rollout, experience.scores
        tokens, mask, temperature = rollout.completion_ids, rollout.completion_mask, self.sampler.temperature
        length, attention = tokens.shape[1], rollout.mask[:, :-1]
        inputs = self.policy.embed(rollout.ids[:, :-1])
        inputs = inputs if inputs.requires_grad else inputs.requires_grad_()
        logits = self.policy(inputs, attention, length)
        reference_inputs = self.policy.reference_embed(rollout.ids[:, :-1]).requires_grad_(self.kl_prefix == "full")
        with torch.set_grad_enabled(self.kl_prefix == "full"):
            reference = self.policy.reference_logits(reference_inputs, attention, length)

        sampled = self.sampler.logits(logits.detach(), rollout.eos_ids, tokens).log_softmax(-1)
        logps, ref_logps = (self.sampler.log_distribution(x.detach()) for x in (logits, reference))
        kl = divergences.categorical_kl(logps, ref_logps)

        weight = -self.beta / temperature * mask.unsqueeze(-1).to(kl.dtype)
        source = weight * divergences.kl_cotangent(logps, ref_logps, kl)
        direct = list(scores.adjoints)
        if self.kl_prefix == "full":
            cotangent = weight * divergences.kl_reference_cotangent(logps, ref_logps)
            (gradient,) = torch.autograd.grad(reference, reference_inputs, cotangent.to(reference.dtype))
            direct.append(Adjoint(next_input_gradient(gradient, length), self.policy.reference_table()))

        tau = self.tau(self.global_step, self.total_steps())
        backward = self.estimator.linearise(sampled, tokens, tau)
        replayed = replay(
            logits,
            inputs,
            self.policy.table(),
            direct,
            lambda adjoint: backward(adjoint) / temperature,
            mask,
            hops=length - 1 if self.hops == "exact" else min(int(self.hops), length - 1),
            tolerance=self.tolerance,
            source=None if self.kl_prefix == "none" else source,
        )
        ascent = replayed.cotangent if self.kl_prefix != "none" else replayed.cotangent + source
        return StepOutput(
            loss=-(ascent * logits).sum() / len(tokens),
            logps=sequences.token_logps(sampled, tokens),
            kl=kl,
            entropy=sequences.entropy(logps),
            log_ratio=sequences.token_logps(logps - ref_logps, tokens),
            metrics={"tau": kl.new_tensor(tau), "hop_residual": replayed.residual},
        )
