"""AlignmentModule: a language model, a reward, and the line of stages from prompts to a loss."""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.profiler import record_function
from transformers import PreTrainedTokenizerBase

from grade_lightning.distributed import is_first_process
from grade_lightning.errors import check_range
from grade_lightning.functional.sequences import masked_sum
from grade_lightning.kl import KL, Coefficient
from grade_lightning.numerics import forked_generators, wide_numbers
from grade_lightning.policies import PolicyLike, as_policy
from grade_lightning.records import (
    Evaluation,
    Experience,
    Prompts,
    Rollout,
    Scores,
    StepOutput,
    TokenStats,
    unique_name,
)
from grade_lightning.rewards import ClassifierReward, NoReward, Reward, RewardLike, as_reward
from grade_lightning.rollouts import Sampler
from grade_lightning.terms import Graphs

from .ahead import Ahead, DrawingAhead
from .evaluation import EvaluationTable
from .first_batch import check_first_batch
from .generating import Generating
from .guards import check_context, check_reward
from .measuring import measure
from .metrics import StepMeter
from .remembering import Remembering, as_seen, joined
from .trainable import Stage, TrainableModule


class AlignmentModule(DrawingAhead, Generating, Remembering, TrainableModule, ABC):
    """A language model, a reward, and a way to raise the reward. A method overrides :meth:`loss`.

    One step collects completions with their scores (:meth:`collect`), then makes a loss of them (:meth:`loss`).

    Args:
        policy: the language model, or its name or folder; the bundled one by default.
        reward: what is maximised: a reward, a function, the name or folder of a classifier, or a list of these, which
            are added; the bundled classifier by default.
        judges: further rewards that are logged and never trained on. A reward can be fooled; a second judge shows it.
        sampler: how completions are drawn, in training and in evaluation.
        beta: coefficient β of the KL to the reference, in reward per nat.
        optimizer: any torch optimizer by class path; it is handed the trainable parameters alone.
        lr_scheduler: any torch scheduler; a straight line to zero over the run by default.
    """

    backpropagates_reward: ClassVar[bool] = False
    """Whether the method needs a differentiable reward."""
    redraws: ClassVar[bool] = False
    """Whether each pass through a batch draws completions anew."""

    def __init__(
        self,
        policy: PolicyLike | None = None,
        reward: RewardLike | None = None,
        judges: list[RewardLike] | None = None,
        sampler: Sampler | None = None,
        beta: float = 0.0,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(optimizer, lr_scheduler)
        check_range("[0, inf)", beta=beta)
        self.policy = as_policy(policy)
        self._gave_reward = reward is not None
        self.reward = ClassifierReward() if reward is None else as_reward(reward)
        self.judges = nn.ModuleList(as_reward(judge) for judge in judges or [])
        self.sampler = sampler or Sampler()
        self.beta = beta
        self.coefficient = Coefficient(KL(beta))
        self._seen: list[Experience] = []
        self._ahead = Ahead()
        self.check_rewards()
        check_reward(self.reward, self.backpropagates_reward)
        self.meter = StepMeter()
        self._table = EvaluationTable()
        self._started, self._checked = True, False
        self._began: float | None = None
        self._tokens = 0

    # ---- what a method says -------------------------------------------------------------------------------------

    def collect(self, batch: dict[str, Any]) -> Experience:
        """Draw completions and score them; the scores have adjoints if the method backpropagates the reward."""
        rollout = self.draw(self.prompts(batch))
        return Experience(rollout, self.score(rollout), self.beta)

    def prompts(self, batch: dict[str, Any]) -> Prompts:
        """What completions are drawn of: the prompts of a batch of the loader."""
        return Prompts.of(batch)

    def judged(self, rollout: Rollout) -> Rollout:
        """What the rewards read."""
        return rollout

    @abstractmethod
    def loss(self, experience: Experience) -> StepOutput:
        """The method: one loss of what :meth:`collect` found."""

    @record_function("reward")
    def score(self, rollout: Rollout) -> Scores:
        """Rewards, with their adjoints if the method backpropagates them."""
        self.meter.count(rollout)
        judged = self.judged(rollout)
        return self.reward.pathwise(judged) if self.backpropagates_reward else self.reward.score(judged)

    def measure(self, rollout: Rollout, known: TokenStats | None = None, graphs: Graphs = "log_ratio") -> TokenStats:
        """One pass of the policy and, unless it is `known`, of its reference; see :func:`.measuring.measure`."""
        return measure(self.policy, self.sampler.distribution, rollout, known, graphs)

    @wide_numbers()
    def draw_loss(self, batch: dict[str, Any]) -> Tensor:
        """The loss of one independent estimate of the gradient."""
        return self.loss(self.collect(batch)).loss

    # ---- setting up ---------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's."""
        return self.policy.tokenizer

    @property
    def rewards(self) -> list[Reward]:
        """The reward, then the judges."""
        return [module for module in (self.reward, *self.judges) if isinstance(module, Reward)]

    def configure_model(self) -> None:
        """Load policy and rewards; nothing happens the second time."""
        self.check_ahead()
        self._load()

    def _load(self) -> None:
        self.policy.load()
        for reward in self.rewards:
            reward.load(self.tokenizer, self.policy.anatomy.size)
        check_reward(self.reward, self.backpropagates_reward, None if self._gave_reward else self.policy.path)

    def prompt_room(self, text: int) -> int | None:
        """What a completion leaves of the context, whether it is sampled or of the data."""
        self.policy.load()
        context = self.policy.context_length
        completion = max(self.sampler.max_new_tokens, text if self.batching.reads_completions else 0)
        return None if context is None else context - completion

    def check_lengths(self, prompt: int, text: int) -> None:
        """Prompt and completion must fit into the contexts of policy and rewards, be they sampled or of the data."""
        completion, flag = self.sampler.max_new_tokens, "--model.sampler.max_new_tokens"
        if self.batching.reads_completions and text > completion:
            completion, flag = text, "--data.max_text_tokens"
        self._load()
        parts = ("prompts", prompt, "--data.max_prompt_tokens"), ("completions", completion, flag)
        check_context(self.policy.context_length, *parts)
        for reward in self.rewards:
            check_context(reward.context_length, *parts, model=f"reward {reward.name}")

    def frozen_modules(self) -> list[nn.Module]:
        """Reward, judges and the reference."""
        reference = [self.policy.reference] if self.policy.reference is not None else []
        return [self.reward, self.judges, *reference]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what was spent, and what the parts remember."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["grade_lightning"]["parts"] = self.part_states()
        if self.sampler.one_behind:
            checkpoint["grade_lightning"]["ahead"] = self.pack_ahead()
        checkpoint["grade_lightning"]["spent"] = {name: count.cpu() for name, count in self.meter.spent.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint fits; from here on the policy is not its reference."""
        super().on_load_checkpoint(checkpoint)
        self.meter.spent |= checkpoint["grade_lightning"].get("spent", {})
        self.load_part_states(checkpoint["grade_lightning"].get("parts", {}))
        self.unpack_ahead(checkpoint["grade_lightning"].get("ahead", []))
        self._started = False

    def save_pretrained(self, folder: str, merge: bool = True) -> None:
        """Write the policy with its tokenizer, and settings with which `generate` samples as the sampler does."""
        self.policy.save_pretrained(folder, merge)
        if is_first_process():
            self.sampler.settings(self.policy).save_pretrained(folder)

    # ---- one training step --------------------------------------------------------------------------------------

    @wide_numbers()
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Collect, and let the method make the loss."""
        self.seed("train", batch_idx)
        experience = self.begin_step(batch)
        step = self.loss(experience)
        if self.stateful():
            self._seen.append(as_seen(experience, step))
        return self.finish_step(experience, step)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Show the parts that remember something what the step was made of."""
        super().on_before_optimizer_step(optimizer)
        if self._seen:
            self.observe(joined(self._seen))
            self._seen = []

    def begin_step(self, batch: dict[str, Any]) -> Experience:
        """Collect; what is collected first is checked, also after a resume."""
        with self.collecting():
            experience = self.collect(batch)
        if self._trainer is not None and not self._checked:
            self.check_first_batch(self.checked(experience))
            self._checked = True
        return experience

    def checked(self, experience: Experience) -> Rollout:
        """What the first batch's check looks at; with a correction, the engine may be somewhat off."""
        rollout = experience.rollout
        return rollout if self.correction is None else replace(rollout, engine_logps=None)

    def check_first_batch(self, rollout: Rollout) -> None:
        """What was sampled is the policy's own; where the run starts, the policy is its reference."""
        half = self.policy.dtype in (torch.bfloat16, torch.float16)
        reduced = half or "16" in str(self.trainer.precision)
        check_first_batch(self.policy, self.sampler, rollout, self._started, reduced)

    def finish_step(self, experience: Experience, step: StepOutput) -> Tensor:
        """Log the step, and hand its loss to Lightning."""
        # an infinite reward must not pass for a large one, or for the best
        step.loss = step.loss * torch.where(experience.scores.total.isinf().any(), torch.nan, 1.0)
        if self._trainer is not None:
            self._log_step(experience, step)
        return step.loss

    def _log_step(self, experience: Experience, step: StepOutput) -> None:
        rollout, scores = experience.rollout, experience.scores
        step.metrics |= {name: step.loss.new_tensor(value) for name, value in self.reward.figures().items()}
        logged = self.meter.figures(rollout, scores, step, experience.beta, self._gather)
        rows = len(rollout.ids)
        self.log_dict(logged, batch_size=rows)
        if not step.stats.referenced:
            self._forget_kl()
        for name in ("reward", "kl") if step.stats.referenced else ("reward",):
            self.log(name, logged[f"train/{name}"], prog_bar=True, logger=False, batch_size=rows)
        self.last_rollout = rollout, scores, masked_sum(step.stats.kl, rollout.sampled)

    def _forget_kl(self) -> None:
        """Lightning would log that of an earlier step once more."""
        for result in (self.trainer._results or {}).values():
            if result.meta.name == "kl" or result.meta.name.startswith("train/kl"):
                result.reset()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Start the clock, when the batch is a new one."""
        super().on_train_batch_start(batch, batch_idx)
        if batch_idx % self.batching.steps_per_batch == 0 or self._began is None:
            self._began, self._tokens = time.perf_counter(), 0

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the speed of the whole step: sampling, reward, both passes and the optimizer.

        A batch that is trained on several times counts as sampled once, unless it is, over the time of all of them.
        """
        rollout, _, _ = self.last_rollout
        self._tokens += int(rollout.sampled.sum()) * self.trainer.world_size
        if (batch_idx + 1) % self.batching.steps_per_batch or self._began is None:
            return
        tokens = self._tokens if self.redraws else self._tokens / self.batching.epochs
        speed = tokens / (time.perf_counter() - self._began)
        self._began = None
        self.log("train/tokens_per_second", speed, batch_size=len(rollout.lengths))
        self.log("tok/s", speed, prog_bar=True, logger=False, batch_size=len(rollout.lengths))

    def evidence(self) -> list[dict[str, Any]]:
        """Completions of the latest step, with their rewards."""
        rollout, scores, _ = self.last_rollout
        rows = zip(rollout.prompts, rollout.completions, scores.total.tolist(), strict=True)
        return [{"prompt": p, "completion": c, "reward": r if math.isfinite(r) else str(r)} for p, c, r in rows]

    def _gather(self, rows: Tensor) -> Tensor:
        """The rows of all processes; the sampler gives each the same number."""
        gathered = self.all_gather(rows)
        assert isinstance(gathered, Tensor)
        return gathered.flatten(0, 1) if gathered.dim() > rows.dim() else gathered

    # ---- evaluation ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    @wide_numbers()
    def evaluate(self, batch: dict[str, Any], stage: Stage, batch_idx: int) -> Evaluation:
        """Draw completions with a fixed seed and measure each."""
        with self._fixed_noise(stage, batch_idx):
            rollout = self.sampler(self.policy, self.prompts(batch), step=self.global_step)
        begun = [reward.begin(self.judged(rollout)) for reward in self.rewards]
        with self.policy.evaluating():
            found = self.measure(rollout)
        mask, scores = rollout.sampled, [finish() for finish in begun]
        length = mask.sum(-1)
        parts: dict[str, Tensor] = {}
        for score in scores:
            parts |= {unique_name(name, parts): value for name, value in score.parts.items()}
        return Evaluation(
            rollout=rollout,
            reward=scores[0].total,
            kl=masked_sum(found.kl, mask),
            entropy=masked_sum(found.entropy, mask) / length,
            length=length,
            ended=rollout.ended,
            ref_nll=-masked_sum(found.ref_logps, mask),
            parts=parts,
        )

    @contextmanager
    def _fixed_noise(self, stage: Stage, batch_idx: int) -> Iterator[None]:
        with forked_generators(self.device):
            self.seed(stage, batch_idx)
            yield

    def _evaluation_step(self, batch: dict[str, Any], stage: Stage, batch_idx: int) -> Evaluation:
        found = self.evaluate(batch, stage, batch_idx)
        self._table.add(found)
        if batch_idx == 0:
            self.last_evaluation = found
        return found

    def _finish_evaluation(self, stage: Stage) -> None:
        figures = self._table.finish(self._gather)
        if isinstance(self.reward, NoReward):  # nobody is to read a table of NaN
            figures = {name: value for name, value in figures.items() if name.split("_")[0] != "reward"}
        self.log_dict({f"{stage}/{name}": value for name, value in figures.items()}, sync_dist=True)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Measure a batch."""
        self._evaluation_step(batch, "val", batch_idx)

    def on_validation_epoch_end(self) -> None:
        """Log the measurements."""
        self._finish_evaluation("val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Evaluation]:
        """Measure a batch; for callbacks, what was found."""
        return {"evaluation": self._evaluation_step(batch, "test", batch_idx)}

    def on_test_epoch_end(self) -> None:
        """Log the measurements."""
        self._finish_evaluation("test")

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """A row for each prompt, as JSON can hold it."""
        return self.evaluate(batch, "predict", batch_idx).rows()
