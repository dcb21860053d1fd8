"""What all policy gradients share: the line of stages, and several optimizer steps on what was drawn at once."""

from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from grade_lightning.advantages import Advantage
from grade_lightning.columns import Columns
from grade_lightning.corrections import EngineCorrection, engine_figures
from grade_lightning.credit import Credit
from grade_lightning.errors import InputError, check_range
from grade_lightning.functional.aggregation import Normalizers
from grade_lightning.gates import Gate
from grade_lightning.kl import KL, Coefficient
from grade_lightning.levels import Level
from grade_lightning.numerics import wide_numbers
from grade_lightning.policies import PolicyLike
from grade_lightning.records import Batching, Experience, Rollout, StepOutput, TokenStats, unique_name
from grade_lightning.rewards import OverlongPenalty, RewardLike
from grade_lightning.rollouts import Sampler
from grade_lightning.selection import Selection
from grade_lightning.terms import Aggregate, Critic, Graphs, KLLoss, PolicyLoss, Term, TokenTerm, furthest

from .guards import check_reward
from .measuring import measure
from .selecting import SelectingModule
from .window import Window, plan_steps


class PolicyGradientModule(SelectingModule):
    """Raises the probability of completions by their advantage. A method is a choice of parts.

    The first five have no default: a method fixes them, so they are no options of it on the command line.

    The stages of a step, each handing its result to the next: *allocate* completions to prompts, *generate* them,
    *score* them, *select* those that are trained on, *measure* their tokens, take *advantages*, and sum the *terms* of
    the loss.

    A *window* is what is drawn at once: `batch_size` completions for each micro-batch of each optimizer step. It is
    gone through `epochs` times, in `minibatches` optimizer steps each time (shuffled if there are several), so
    Lightning's automatic optimization, clipping, accumulation and step counting stay as they are: `max_steps` counts
    optimizer steps.

    Args:
        advantage: advantage of each token.
        level: over what a ratio is taken.
        gate: coefficient of A ∇log π.
        aggregate: weight of each token in the loss.
        clips: whether the gate cuts ratios off, so that the share of those is worth logging.
        policy: the language model; the bundled one by default.
        reward: what is maximised, of any kind; the bundled classifier by default.
        judges: further rewards that are logged and never trained on.
        sampler: how completions are drawn.
        selection: which prompts get how many completions, and which of them are trained on; all by default.
        length_penalty: added to the reward of what was selected; none by default.
        kl: the KL to the reference.
        critic: a value head with its loss; none by default.
        terms: further terms of the loss; one with parameters is an `nn.Module`, too, and these are trained.
        correction: weights for an engine that draws from a slightly different policy; none by default.
        credit: takes off the advantages what is known of a completion, without a bias; none by default.
        whole_groups: train on all completions of a prompt in the same step.
        num_generations: completions for each prompt, G; `data.batch_size` counts completions.
        epochs: how often the completions of a window are used.
        minibatches: optimizer steps in each epoch.
        micro_batches: what the micro-batches of an optimizer step have the same number of: `rows`, or `tokens`
            (padding included), so that one with long completions has few of them and needs no more memory.
        optimizer: any torch optimizer by class path.
        lr_scheduler: any torch scheduler; a straight line to zero over the run by default.
    """

    min_generations: ClassVar[int] = 1
    """Completions of a prompt that the advantages need."""
    loss_is_objective = False

    def __init__(
        self,
        advantage: Advantage,
        level: Level,
        gate: Gate,
        aggregate: Aggregate,
        clips: bool,
        policy: PolicyLike | None = None,
        reward: RewardLike | None = None,
        judges: list[RewardLike] | None = None,
        sampler: Sampler | None = None,
        selection: Selection | None = None,
        length_penalty: OverlongPenalty | None = None,
        kl: KL = KL(),
        critic: Critic | None = None,
        terms: list[Term] | None = None,
        correction: EngineCorrection | None = None,
        credit: Credit | None = None,
        whole_groups: bool = False,
        num_generations: int = 1,
        epochs: int = 1,
        minibatches: int = 1,
        micro_batches: Literal["rows", "tokens"] = "rows",
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=3e-4),
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(policy, reward, judges, sampler, kl.beta, optimizer, lr_scheduler)
        check_range("[1, inf)", num_generations=num_generations, epochs=epochs, minibatches=minibatches)
        if num_generations < self.min_generations:
            raise InputError(
                f"num_generations = {num_generations}: {type(self).__name__} compares the completions of a prompt with "
                f"each other; give {self.min_generations} or more"
            )
        self.advantage = advantage
        self.selection = selection or Selection()
        self.length_penalty = length_penalty
        self.kl = kl
        self.coefficient = Coefficient(kl)
        self.critic = critic
        self.correction = correction
        self.credit = credit
        if credit is not None:
            credit.attach(advantage, aggregate, type(self).__name__)
            check_reward(self.reward, credit.needs_gradient)
        line = PolicyLoss(gate, aggregate, level, clips)
        held = [KLLoss(kl, aggregate)] if kl.in_loss else []
        own: dict[str, Term] = {}
        for term in terms or []:
            if isinstance(term, TokenTerm):
                term.aggregate = term.aggregate or aggregate
            own[unique_name(type(term).__name__, own)] = term
        self.terms: list[Term] = [line, *held, *(part for part in (critic, credit) if part is not None), *own.values()]
        needs = [type(term).__name__ for term in self.terms if term.graphs in ("log_ratio", "kl")]
        if kl.every > 1 and needs:
            raise InputError(f"kl.every = {kl.every}: {needs[0]} trains on the reference in every step; leave it out")
        self.own_terms = own
        self.trained_terms = nn.ModuleDict({name: term for name, term in own.items() if isinstance(term, nn.Module)})
        self.whole_groups = whole_groups
        self.num_generations = num_generations
        self.epochs = epochs
        self.minibatches = minibatches
        self.by_tokens = micro_batches == "tokens"
        self._window: Window | None = None
        self._packed: dict[str, Any] | None = None

    @property
    def batching(self) -> Batching:
        """A window."""
        return Batching(
            "prompts", self.num_generations, self.epochs, self.minibatches, self.accumulation(), self.selection.spare
        )

    def configure_model(self) -> None:
        """Load policy and rewards. LoRA's dropout is switched off: a ratio compares the policy with itself."""
        super().configure_model()
        self.check_selection()
        if self.credit is not None:
            self.credit.check(self.reward)
        if self.critic is not None:
            self.critic.build(self.policy.width)
        if not self.policy.dropout:
            for module in self.policy.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0

    # ---- allocate, generate, score, select ----------------------------------------------------------------------

    def collect(self, batch: dict[str, Any]) -> Experience:
        """A window; if it is going to be used several times, it is measured here."""
        seen = self.sample(self.prompts(batch))
        rollout = seen.rollout
        counts = torch.stack([rollout.sampled.sum(), rollout.lengths.new_tensor(len(rollout.ids))])
        seen.normalizers = Normalizers(*self.reduce.mean(counts).tolist())
        if self.batching.steps_per_batch == 1:
            return seen  # the training pass measures
        with torch.no_grad(), self.policy.evaluating():
            parts = torch.arange(len(rollout.ids)).chunk(self.batching.parts)
            stats = [self.measure_drawn(rollout.select(rows)) for rows in parts]
        return self.appraise(seen, TokenStats.join(stats, rollout.completion_ids.shape[1]))

    # ---- measure, advantage -------------------------------------------------------------------------------------

    def measure(self, rollout: Rollout, known: TokenStats | None = None, graphs: Graphs = "log_ratio") -> TokenStats:
        """One pass, with the critic's values."""
        return self._measure(rollout, known, graphs)

    def measure_drawn(self, rollout: Rollout, graphs: Graphs = "log_ratio") -> TokenStats:
        """The first pass over what was drawn in this step: the reference is read in one of `kl.every` steps."""
        if (self.global_step + 1) % self.kl.every == 0:
            return self.measure(rollout, None, graphs)
        return self._measure(rollout, None, graphs, referenced=False)

    def _measure(
        self, rollout: Rollout, known: TokenStats | None, graphs: Graphs, referenced: bool = True
    ) -> TokenStats:
        values = None if self.critic is None else self.critic.values
        parts = [part for part in self.parts().values() if isinstance(part, Columns)]
        scores = None if self.credit is None else self.credit.scores(rollout)
        distribution = self.sampler.distribution
        return measure(self.policy, distribution, rollout, known, graphs, values, parts, scores, referenced)

    def appraise(self, seen: Experience, old: TokenStats) -> Experience:
        """Add what was measured when the completions were drawn, and the advantages that follow from it."""
        total, penalties = seen.scores.total, torch.zeros_like(old.logps)
        if self.kl.in_reward:
            penalties = -seen.beta * self.kl.penalty(old.log_ratio, old.kl, seen.rollout.sampled)
        rewards = total
        if self.kl.credit == "sequence":
            rewards, penalties = total + penalties.sum(-1), torch.zeros_like(penalties)
        seen, weights = replace(seen, old=old, rewards=rewards, penalties=penalties), None
        advantages = raw = self.advantage(seen, self.reduce)
        if self.credit is not None:
            advantages = self.credit.adjust(seen, raw)
        seen.metrics = seen.metrics | engine_figures(old.logps, seen.rollout)
        if self.correction is not None:
            weights, figures = self.correction(old.logps, seen.rollout)
            advantages, seen.metrics = advantages * weights, seen.metrics | figures
        if self.credit is not None:
            seen = self.credit.shared(seen, raw, weights)
        returns = None if self.critic is None else self.critic.targets(seen, self.reduce)
        seen = replace(seen, advantages=advantages.masked_fill(~seen.mask, 0), returns=returns)
        kept = self.selection.tokens(seen)
        if kept is not None:
            seen = replace(seen, kept=kept, advantages=seen.advantages.masked_fill(~kept, 0))
            tokens = self.reduce.mean(seen.sampled.sum().float())
            seen.normalizers = seen.normalizers._replace(tokens=tokens)
            seen.metrics = seen.metrics | {"kept_tokens": seen.sampled.sum() / seen.rollout.sampled.sum()}
        return seen

    # ---- terms --------------------------------------------------------------------------------------------------

    def loss(self, experience: Experience) -> StepOutput:
        """The sum of the terms."""
        return self.add_terms(*self.measured(experience))

    def measured(self, seen: Experience) -> tuple[Experience, TokenStats]:
        """The training pass. A window that is used once is measured by it, and has its advantages from there."""
        graphs = furthest(self.terms)
        if seen.old is not None:
            return seen, self.measure(seen.rollout, seen.old, graphs)
        now = self.measure_drawn(seen.rollout, graphs)
        return self.appraise(seen, now.detach()), now

    def add_terms(self, seen: Experience, now: TokenStats) -> StepOutput:
        """The terms of the loss, and what they log."""
        loss, metrics = now.logps.new_zeros(()), {"beta": now.logps.new_tensor(seen.beta)}
        for term in self.terms:
            value, figures = term(seen, now, self.reduce)
            loss, metrics = loss + value, metrics | figures
        stats = replace(seen.old, logps=now.logps.detach())
        return StepOutput(loss, stats, metrics | seen.metrics, seen)

    # ---- one training step --------------------------------------------------------------------------------------

    @wide_numbers()
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """One micro-batch of the window; the first draws it."""
        self.seed("train", batch_idx)
        steps, batching = self.batching.steps_per_batch, self.batching
        step = batch_idx % steps
        if self._packed is not None:
            self._window, self._packed = Window.unpack(self._packed, self.tokenizer, self.device), None
        if step == 0 or self._window is None:
            seen = self.begin_step(batch)
            shares = self.policy.shares_prompts
            how = self.whole_groups, shares, self.by_tokens
            plan = plan_steps(seen, batching, self.reduce.mean, *how) if steps > 1 else []
            self._window = Window(seen, plan)
        window = self._window
        seen = window.experience if steps == 1 else window.part(step)
        output = self.loss(seen)
        loss = self.finish_step(seen, output)
        if step + 1 == steps:
            self.observe(output.experience or seen if steps == 1 else window.experience)
            self._window = None
        return loss

    def parts(self) -> dict[str, Any]:
        """Those that may remember something, or ask for statistics of their own, by name."""
        named = {"kl": self.coefficient, "advantage": self.advantage, "selection": self.selection}
        named |= {} if self.credit is None else {"credit": self.credit}
        return named | {f"term {name}": term for name, term in self.own_terms.items()} | super().parts()

    # ---- checkpoints --------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add, in the middle of a window, the window of each process."""
        super().on_save_checkpoint(checkpoint)
        window = self._window
        own = window.pack() if window is not None and window.experience.old is not None else None  # a step that failed
        checkpoint["grade_lightning"]["windows"] = self.reduce.gather(own)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Resume in the middle of the window; with another number of processes or of steps, begin a new one."""
        super().on_load_checkpoint(checkpoint)
        windows = checkpoint["grade_lightning"].get("windows", [None])
        rank = self.global_rank if self._trainer is not None else 0
        own = windows[rank] if len(windows) == self.reduce.processes else None
        self._packed = own if own is not None and len(own["plan"]) == self.batching.steps_per_batch else None
