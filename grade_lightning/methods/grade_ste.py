"""GRADE-STE: the reward's gradient flows through the sampled tokens."""

from dataclasses import replace
from typing import Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from grade_lightning.blends import Calibrated
from grade_lightning.corrections import EngineCorrection, engine_figures
from grade_lightning.credit import COLUMN
from grade_lightning.errors import InputError, check_range
from grade_lightning.estimators import StraightThrough, TokenEstimator
from grade_lightning.functional import divergences, sequences
from grade_lightning.functional.control_variates import deviation
from grade_lightning.functional.corrections import WeightLevel
from grade_lightning.functional.replay import Adjoint, next_input_gradient, replay
from grade_lightning.functional.vocabulary import Vocabulary
from grade_lightning.kl import KL, Coefficient
from grade_lightning.modules.blending import BlendingModule
from grade_lightning.modules.measuring import COUNT, figures, sampled_logps, stats_of
from grade_lightning.numerics import widened
from grade_lightning.policies import Network, PolicyLike
from grade_lightning.records import Experience, Rollout, StepOutput
from grade_lightning.rewards import RewardLike
from grade_lightning.rollouts import Sampler
from grade_lightning.schedules import Constant, Schedule


class GradeSTE(BlendingModule):
    r"""Maximise reward − β KL(π‖π_ref) by backpropagation through the sampled tokens.

    The completions are sampled as usual; their Gumbel noise is restored afterwards, and the gradient of the unrolled
    straight-through sampler is rebuilt in one teacher-forced pass (:mod:`grade_lightning.functional.replay`). With
    `hops="exact"` it is the unrolled gradient itself; by default each token is moved with the later ones held fixed.

    Args:
        policy: the language model.
        reward: a differentiable reward of the policy's vocabulary; of another through :class:`.TranslatedReward`.
        judges: further rewards that are logged and never trained on.
        sampler: how completions are drawn. Its top-k restricts the relaxed tokens, too (the paper's k is 256).
        estimator: how a sampled token passes its gradient on. The paper's is `Gumbel`; plain straight-through, the
            default, has less noise and did better on the bundled task.
        hops: how often the adjoint is carried to earlier tokens; `exact` carries it all the way. With 0, the default,
            a step costs as much as a policy gradient's, beside a backward pass of the reward; on IMDB runs ended with
            the same reward as with 2.
        tolerance: stop hopping once the adjoint changes by less than this fraction.
        tau: temperature τ of the relaxed tokens, a schedule over the run.
        beta: coefficient β of the exact KL, in reward per nat.
        kl_target: make β adaptive, as `kl.target` of the policy gradients: it moves until the KL is this many nats per
            sequence.
        kl_rate: make that a bound instead, as `kl.rate`: β grows by this for each nat beyond it, and may fall to 0.
        correction: weights for an engine that draws from a slightly different policy; `sequence`, or `prefix`, which
            weighs each position's KL by the tokens before it alone; none by default.
        blend: what earlier batches do to the gradient: `Calibrated` gives it its length, `Mixed` and `Debiased` take
            bias away; none by default.
        num_generations: completions for each prompt, G; `data.batch_size` counts completions. `Mixed` and `Debiased`
            need 2 or more.
        kl_prefix: how far the KL's gradient goes: `none`, each position's own distribution; `policy`, also that earlier
            tokens moved the policy's later distributions; `full`, also those of the reference: the true gradient. The
            last two need hops.
        optimizer: any torch optimizer by class path.
        lr_scheduler: any torch scheduler; a straight line to zero over the run by default.

    References:
        | GRADE: Replacing Policy Gradients with Backpropagation for LLM Alignment (Nel, 2025),
          https://arxiv.org/abs/2601.11574. Departures: no Gumbel noise and no hops by default; replay instead of
          unrolling; completions end at their end-of-sequence token; the KL is part of the loss.
    """

    backpropagates_reward = True
    takes_older = True

    def __init__(
        self,
        policy: PolicyLike | None = None,
        reward: RewardLike | None = None,
        judges: list[RewardLike] | None = None,
        sampler: Sampler | None = None,
        estimator: TokenEstimator | None = None,
        hops: int | Literal["exact"] = 0,
        tolerance: float = 0.0,
        tau: Schedule | None = None,
        beta: float = 0.002,
        kl_target: float | None = None,
        kl_rate: float | None = None,
        kl_prefix: Literal["none", "policy", "full"] = "none",
        correction: EngineCorrection | None = None,
        blend: Calibrated | None = None,
        num_generations: int = 1,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=3e-4),
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(policy, reward, judges, sampler, beta, optimizer, lr_scheduler)
        check_range("[0, inf)", hops=None if hops == "exact" else hops, tolerance=tolerance)
        if hops == 0 and kl_prefix != "none":
            raise InputError(f"kl_prefix = {kl_prefix}: the KL reaches earlier tokens by hops; set hops to 1 or more")
        self.coefficient = Coefficient(KL(beta, target=kl_target, rate=kl_rate))
        self.estimator = estimator or StraightThrough()
        self.hops = hops
        self.tolerance = tolerance
        self.tau = tau or Constant(1.0)
        self.kl_prefix = kl_prefix
        if correction is not None and correction.level == "token":
            raise InputError(
                "correction.level = token: the reward's gradient at a token depends on the whole completion; set "
                "prefix or sequence"
            )
        self.correction = correction
        self.set_blend(blend, num_generations)

    def loss(self, experience: Experience) -> StepOutput:
        """One replay of the rollout."""
        rollout, scores = experience.rollout, experience.scores
        mask, tau = rollout.sampled, self.tau(self.global_step, self.total_steps())
        length, distribution, frozen = mask.shape[1], self.sampler.distribution, self.policy.frozen
        vocabulary, inputs = self.states(self.policy, rollout)
        with torch.set_grad_enabled(self.kl_prefix == "full"):
            reference, reference_inputs = self.states(frozen, rollout)
        token = distribution.through(self.estimator, rollout, tau)
        weights, kl_weights, corrected = self.importance(vocabulary, rollout)

        def kl_cotangent(dist: Tensor, ref_dist: Tensor, kl: Tensor, rows: slice) -> Tensor:
            found = distribution.tempered(divergences.kl_cotangent(dist, ref_dist, kl))
            return -self.beta * kl_weights[rows] * found

        def held(logits: Tensor, rows: slice) -> Tensor:
            """Through each position's own KL, of the policy."""
            dist, ref_dist = (distribution.log_distribution(x) for x in (logits, reference.at(rows)))
            return kl_cotangent(dist, ref_dist, divergences.categorical_kl(dist, ref_dist), rows)

        def reference_cotangent(ref_logits: Tensor, rows: slice) -> Tensor:
            """The same, of the reference."""
            dist, ref_dist = (distribution.log_distribution(x) for x in (vocabulary.at(rows), ref_logits))
            found = distribution.tempered(divergences.kl_reference_cotangent(dist, ref_dist))
            return -self.beta * kl_weights[rows] * found

        taken = [(rollout.take(part.gradient), part.table) for part in scores.adjoints]
        slope = 1.0 if self.blend is None else self.blend.slope
        direct = [Adjoint(slope * gradient * weights.to(gradient), table) for gradient, table in taken]
        if self.kl_prefix == "full":
            assert reference_inputs is not None  # it needs hops
            pulled = reference.pull(reference_cotangent)
            (gradient,) = torch.autograd.grad(reference.hidden, reference_inputs, pulled)
            arrived = rollout.take(next_input_gradient(gradient, length))
            direct.append(Adjoint(arrived, frozen.table()))

        source = None if self.kl_prefix == "none" else held
        replayed = replay(
            vocabulary,
            inputs,
            self.policy.table(),
            direct,
            token,
            rollout.positions,
            length,
            hops=length - 1 if self.hops == "exact" else min(int(self.hops), length - 1),
            tolerance=self.tolerance,
            source=source,
        )

        through = self.blended(replayed.cotangent, source, vocabulary, reference, experience, weights)
        token_scores = None if self.blend is None else self.blend.credit.scores(rollout)

        def ascent(logits: Tensor, rows: slice) -> tuple[Tensor, tuple[Tensor, ...]]:
            sampled, dist = distribution.both(rollout, logits, rows)
            ref_dist = distribution.log_distribution(reference.at(rows))
            found = tuple(figures(sampled, dist, lambda: ref_dist, rollout.tokens[rows]))
            cotangent = through(logits, rows)
            if self.kl_prefix == "none":
                cotangent = cotangent + kl_cotangent(dist, ref_dist, found[3], rows)
            more = () if token_scores is None else (deviation(sampled, rollout.tokens[rows], token_scores(rows)),)
            return cotangent, (*found, *more)

        zero, columns = vocabulary.push(ascent)
        more = {} if token_scores is None else {COLUMN: rollout.put(columns[COUNT])}
        now = replace(stats_of(rollout, columns[:COUNT]), columns=more)
        objective = scores.total.nansum() - self.beta * sequences.masked_sum(now.kl, mask).sum()
        return StepOutput(
            loss=-(zero + objective) / len(mask) - (0.0 if self.blend is None else self.blend.held(self.trained())),
            stats=now,
            metrics={
                "tau": objective.new_tensor(tau),
                "beta": objective.new_tensor(self.beta),
                **({"hop_residual": replayed.residual} if self.hops else {}),
                **engine_figures(now.logps, rollout),
                **corrected,
                **({} if self.blend is None else self.blend.figures(objective.device)),
            },
        )

    def states(self, network: Network, rollout: Rollout) -> tuple[Vocabulary, Tensor | None]:
        """A network's logits at the sampled positions, and the inputs at which hops, if any, take gradients."""
        training_pass = self.policy.training_pass
        if self.hops == 0:
            return network.vocabulary(rollout.take(training_pass.hidden(network, rollout))), None
        inputs = network.embed(rollout.ids[:, :-1])
        inputs = inputs if inputs.requires_grad else inputs.requires_grad_()
        hidden, inputs = training_pass.hidden_for_hops(network, inputs, rollout.mask[:, :-1], rollout.sampled.shape[1])
        return network.vocabulary(rollout.take(hidden)), inputs

    @torch.no_grad()
    def importance(self, vocabulary: Vocabulary, rollout: Rollout) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Weights of the reward's and of the KL's gradient at each sampled token, each (n, 1), and what is logged."""
        if self.correction is None:
            one = torch.ones_like(widened(vocabulary.hidden[:, :1]))
            return one, one, {}
        logps = sampled_logps(vocabulary, self.sampler.distribution, rollout)
        level: WeightLevel = "before" if self.correction.level == "prefix" else "sequence"
        weights, logged = self.correction(logps, rollout, "sequence")
        kl_weights, _ = self.correction(logps, rollout, level)
        return rollout.take(weights).unsqueeze(1), rollout.take(kl_weights).unsqueeze(1), logged
