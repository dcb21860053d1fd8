"""AlignmentModule: rollout → score → loss, logging, optimizers and checkpoint contents, once for every method."""

import hashlib
import json
import math
import os
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.profiler import record_function
from transformers import PreTrainedTokenizerBase

from grade_lightning.errors import DivergenceError, InputError, check_range
from grade_lightning.functional import divergences, sequences
from grade_lightning.functional.vocabulary import Vocabulary
from grade_lightning.policies import Policy
from grade_lightning.rewards import ClassifierReward, Reward, Scores, unique_name
from grade_lightning.rollouts import Rollout, Sampler
from grade_lightning.strategies import FSDP2, is_first_process

View = Literal["prompts", "labelled", "text", "pairs"]
Stage = Literal["train", "val", "test", "predict"]


BAD_BATCHES = 3
"""Batches in a row without a finite gradient that end a run."""


@dataclass
class Experience:
    """Completions and what was made of them before any update. Methods add what they need by subclassing."""

    rollout: Rollout
    scores: Scores


@dataclass
class Measured:
    """What one forward pass says about a rollout; each (B, T)."""

    logps: Tensor
    """log π of the sampled tokens, of the distribution that was sampled."""
    log_ratio: Tensor
    """log π − log π_ref of the sampled tokens, at the sampling temperature and untruncated."""
    kl: Tensor
    """Exact KL(π‖π_ref), nats."""
    entropy: Tensor
    """Entropy, nats; no graph."""
    ref_logps: Tensor
    """log π_ref of the sampled tokens, at the sampling temperature and untruncated; no graph."""
    values: Tensor | None = None
    """Expected return, from a value head."""

    def map(self, function: Callable[[Tensor], Tensor]) -> "Measured":
        """The same with `function` done to each tensor."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        mapped: dict[str, Any] = {name: None if x is None else function(x) for name, x in found.items()}
        return Measured(**mapped)

    @classmethod
    def of(cls, rollout: Rollout, columns: tuple[Tensor, ...]) -> "Measured":
        """Put what :func:`figures` found where it belongs."""
        logps, whole, kl, entropy, ref_logps = (rollout.unpacked(column) for column in columns)
        return cls(logps=logps, log_ratio=whole - ref_logps, kl=kl, entropy=entropy, ref_logps=ref_logps)


def figures(sampled: Tensor, dist: Tensor, reference: Callable[[], Tensor], tokens: Tensor) -> Iterator[Tensor]:
    """What is measured at each of n positions, one after another, each (n,).

    Args:
        sampled: log-probabilities of the distribution that was sampled, (n, V).
        dist: the same without truncation.
        reference: makes those of the reference; called when it is their turn.
        tokens: the sampled tokens, (n,).

    Yields:
        log π of the tokens as sampled; log π without truncation; exact KL; entropy; log π_ref.
    """
    yield sequences.token_logps(sampled, tokens)
    yield sequences.token_logps(dist, tokens)
    ref_dist = reference()
    yield divergences.categorical_kl(dist, ref_dist)
    yield sequences.entropy(dist)
    yield sequences.token_logps(ref_dist, tokens)


@dataclass
class StepOutput:
    """What a method makes of its experience."""

    loss: Tensor
    """The scalar that Lightning differentiates."""
    logps: Tensor
    """(B, T): log-probabilities of the completion's tokens, as the training pass has them; no graph."""
    kl: Tensor
    """(B, T): exact KL to the reference at each position, nats; no graph."""
    entropy: Tensor
    """(B, T): entropy of the policy at each position, nats; no graph."""
    log_ratio: Tensor
    """(B, T): log π − log π_ref of each sampled token, at the sampling temperature and untruncated; no graph."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Further scalars, logged as `train/{name}`, or as they are called where they say what they belong to."""


@contextmanager
def wide_numbers() -> Iterator[None]:
    """New tensors and quotients of integers are float32 or better; in a step of `bf16-true` they would be bfloat16."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.promote_types(before, torch.float32))
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class TrainableModule(LightningModule):
    """What every module of this library shares: optimizers over what is trained, checkpoints of what is trained.

    Args:
        optimizer: any torch optimizer by class path; it is handed the trainable parameters alone.
        lr_scheduler: any torch scheduler; stepped after each optimizer step. By default a straight line to zero over
            the run, as in transformers and TRL (constant: `torch.optim.lr_scheduler.ConstantLR` with `factor: 1`).
    """

    view: View
    """Which view of the data the module trains on."""
    unrolls: ClassVar[bool] = False
    """Whether a step's graph goes through the network more than once."""

    def __init__(self, optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable | None) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.strict_loading = False  # `on_load_checkpoint` is stricter
        self.skipped = 0
        """Steps that were left out because their gradient was not finite."""
        self._bad: set[tuple[int, int]] = set()

    @property
    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Tokenizer for the data."""

    @abstractmethod
    def save_pretrained(self, folder: str, merge: bool = True) -> None:
        """Write what was trained as a Hugging Face folder; adapters are merged into the weights, or written alone.

        Where it is spread over processes, all of them must call this.
        """

    @property
    def visits(self) -> int:
        """How many training steps in a row are given the same batch."""
        return 1

    def rows_per_batch(self, batch_size: int) -> int:
        """Rows of the data in a training batch, of which `batch_size` sequences are trained on in each step."""
        return batch_size

    def check_windows(self) -> None:
        """For a module that is given the same batch several times in a row.

        Raises:
            InputError: the number of micro-batches in a step is to change during the run.
        """
        if any(isinstance(callback, GradientAccumulationScheduler) for callback in self.trainer.callbacks):  # type: ignore[attr-defined]
            raise InputError(
                "GradientAccumulationScheduler: a batch is read for a fixed number of micro-batches; "
                "set --trainer.accumulate_grad_batches instead"
            )
        batches = self.trainer.num_training_batches
        if not math.isinf(batches) and batches % self.visits:
            rank_zero_warn(
                f"an epoch has {batches} batches, no multiple of the {self.visits} that are trained on what is read or "
                "sampled at once: the last of each epoch is cut short"
            )

    def total_steps(self) -> int:
        """Optimizer steps of the whole run; 0 where it has no known end."""
        if self._trainer is None:
            return 0
        steps = self.trainer.estimated_stepping_batches
        return 0 if math.isinf(steps) else max(0, int(steps))

    def setup(self, stage: str) -> None:
        """Check that the strategy can do what the methods do.

        Raises:
            InputError: it cannot.
        """
        strategy = self.trainer.strategy
        if isinstance(strategy, (FSDPStrategy, ModelParallelStrategy)) and not isinstance(strategy, FSDP2):
            raise InputError(
                f"--trainer.strategy: under {type(strategy).__name__} a method could not call parts of the network by "
                "themselves; use fsdp2, or ddp"
            )

    def configure_optimizers(self) -> Any:
        """Optimizer and scheduler over the parameters that require grad.

        Raises:
            InputError: their arguments are not what they take.
        """
        trained = [p for p in self.parameters() if p.requires_grad]
        if any(p.dtype in (torch.bfloat16, torch.float16) for p in trained):
            rank_zero_warn(
                "weights in half precision are trained: updates of less than a 500th of a weight are rounded away; "
                "--trainer.precision bf16-mixed keeps them"
            )
        try:
            optimizer = self.optimizer(trained)
            if self.lr_scheduler is not None:
                scheduler = self.lr_scheduler(optimizer)
            else:
                scheduler = LambdaLR(optimizer, lambda step: self._remaining(step))  # a longer resumed run stretches it
        except (TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{reason}; check --model.optimizer and --model.lr_scheduler") from error
        settings: dict[str, Any] = {"scheduler": scheduler, "interval": "step"}
        if isinstance(scheduler, ReduceLROnPlateau):
            settings |= {"monitor": scheduler.monitor, "strict": False}  # a validation's metric comes later
        return {"optimizer": optimizer, "lr_scheduler": settings}

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Leave out a step whose gradient is not finite, so that the weights stay finite.

        Raises:
            DivergenceError: there was no other on the latest three batches.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if bool(norm.isfinite()):
            self._bad.clear()
        else:
            self.skipped += 1
            if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
                return  # in 16 bits it leaves the step out itself, and looks for its scale
            for parameter in parameters:
                parameter.grad = None
            # all steps on one rollout are one
            self._bad.add((self.trainer.current_epoch, self.trainer.fit_loop.epoch_loop.batch_idx // self.visits))
        if len(self._bad) == BAD_BATCHES:
            raise DivergenceError(
                f"{BAD_BATCHES} batches in a row gave gradients that are not finite, the last at step "
                f"{self.global_step}; the weights are those before them. What the last was made of lies in "
                f"{self._save_evidence()}; lower --model.optimizer.lr or look at the reward and the data"
            )

    def _save_evidence(self) -> Path:
        folder = Path(self.trainer.log_dir or self.trainer.default_root_dir)
        path = folder / f"not_finite_step_{self.global_step}_rank_{self.global_rank}.json"
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.evidence(), indent=1, ensure_ascii=False), encoding="utf-8")
        return path

    def evidence(self) -> list[dict[str, Any]]:
        """What the latest batch was, row by row: for those who ask why it gave no finite gradient."""
        texts = self.tokenizer.batch_decode(self._batch["input_ids"], skip_special_tokens=True)
        return [{"text": text} for text in texts]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Log how many steps were left out so far."""
        self._batch = batch
        self.log("train/skipped_steps", float(self.skipped))

    def _remaining(self, step: int) -> float:
        """The part of the run that is left; all of it where it has no known end."""
        # asked for the total before it has restored its loops, Lightning makes a loader that never finds its place
        steps = self.total_steps() if step > 0 else 0
        return max(0.0, 1 - step / steps) if steps > 0 else 1.0

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Only what is trained; frozen weights come from where they came from before."""
        state = super().state_dict(*args, **kwargs)
        frozen = {name for name, p in self.named_parameters(remove_duplicate=False) if not p.requires_grad}
        frozen |= {name for module in self.frozen_modules() for name in _keys(self, module)}
        return {name: value for name, value in state.items() if name not in frozen}

    def frozen_modules(self) -> list[nn.Module]:
        """Modules that are never trained and never saved."""
        return []

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Name the method, so that no other loads it unawares."""
        checkpoint["grade_lightning"] = {
            "method": type(self).__name__,
            "processes": self._processes(),
            "skipped": self.skipped,
            "bad": sorted(self._bad),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint is this method's and holds exactly what is trained.

        Raises:
            InputError: it is not, or does not.
        """
        check_method(checkpoint.get("grade_lightning", {}).get("method"), type(self).__name__)
        own = checkpoint["grade_lightning"]
        self.skipped, self._bad = own.get("skipped", 0), {tuple(batch) for batch in own.get("bad", [])}
        saved, expected = (
            {(name, tuple(value.shape)) for name, value in state.items()}
            for state in (checkpoint["state_dict"], self.state_dict())
        )
        if saved != expected:
            odd = sorted(saved ^ expected)
            raise InputError(
                f"checkpoint: its weights do not fit this model ({len(expected - saved)} are missing, "
                f"{len(saved - expected)} are unknown, such as {odd[0][0]}); give the policy and LoRA settings it had"
            )
        saved_by, now = own.get("processes", 1), self._processes()
        if saved_by != now and self._trainer is not None and self.trainer.training:
            rank_zero_warn(
                f"checkpoint: it is of {saved_by} processes and this run has {now}. Weights, optimizer, schedule and "
                f"running statistics go on as they were; which rows come next, and the noise, are those of {now}"
            )

    def _seed(self, stage: Stage, batch_idx: int) -> None:
        """Tie a step's randomness to (seed, stage, step, micro-batch, rank): a resumed run draws the same."""
        key = (int(os.environ.get("PL_GLOBAL_SEED", "0")), stage, self._step(stage), batch_idx, self._rank())
        seed = hash_seed(*key)
        torch.manual_seed(seed)
        random.seed(seed)  # for rewards of the user's own
        numpy.random.seed(seed % 2**32)

    def _step(self, stage: Stage) -> int:
        return self.global_step if stage == "train" and self._trainer is not None else 0

    def _rank(self) -> int:
        return self.global_rank if self._trainer is not None else 0

    def _processes(self) -> int:
        return 1 if self._trainer is None else self.trainer.world_size


def check_method(method: str | None, own: str) -> None:
    """Check that the method of a checkpoint is one's own.

    Raises:
        InputError: it is another, or no method of ours.
    """
    if method != own:
        whose = f"of {method}" if method else "not of grade_lightning"
        raise InputError(f"checkpoint: it is {whose}, but --model is {own}; name the model that it was written by")


class AlignmentModule(TrainableModule, ABC):
    """A language model, a reward, and a way to raise the reward. A method overrides :meth:`loss`.

    One step samples completions and scores them (:meth:`explore`), then makes a loss of them (:meth:`loss`).

    Args:
        policy: the language model; the bundled one by default.
        reward: what is maximised; the bundled classifier by default.
        judges: further rewards that are logged and never trained on. A reward can be fooled; a second judge shows it.
        sampler: how completions are drawn, in training and in evaluation.
        beta: coefficient β of the KL to the reference, in reward per nat.
        optimizer: any torch optimizer by class path; it is handed the trainable parameters alone.
        lr_scheduler: any torch scheduler; a straight line to zero over the run by default.
    """

    view: View = "prompts"
    backpropagates_reward: ClassVar[bool] = False
    """Whether the method needs a differentiable reward."""

    def __init__(
        self,
        policy: Policy | None = None,
        reward: Reward | None = None,
        judges: list[Reward] | None = None,
        sampler: Sampler | None = None,
        beta: float = 0.0,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(optimizer, lr_scheduler)
        check_range("[0, inf)", beta=beta)
        self.policy = policy or Policy()
        self.reward = reward or ClassifierReward()
        self.judges = nn.ModuleList(judges or [])
        self.sampler = sampler or Sampler()
        self.beta = beta
        if self.backpropagates_reward and not self.reward.differentiable:
            self.reward.pathwise(None)  # type: ignore[arg-type]  # says what to do instead
        self.epochs = 1
        self._evaluation: dict[str, list[Tensor]] = {}
        self._fresh = True
        self._began: float | None = None
        self._tokens = 0
        self.spent = {"sampled_tokens": torch.tensor(0), "reward_calls": torch.tensor(0)}
        """Tokens sampled and completions scored in training, by all processes; saved in checkpoints."""
        self._uncounted = [0, 0]

    def explore(self, batch: dict[str, Any]) -> Experience:
        """Sample completions and score them; the scores have adjoints if the method backpropagates the reward."""
        rollout = self.sampler(self.policy, **batch)
        return Experience(rollout, self.score(rollout))

    @record_function("reward")
    def score(self, rollout: Rollout) -> Scores:
        """Rewards, with their adjoints if the method backpropagates them."""
        self.count(rollout)
        return self.reward.pathwise(rollout) if self.backpropagates_reward else self.reward.score(rollout)

    def count(self, rollout: Rollout) -> None:
        """Remember what was sampled and scored: what methods are compared at."""
        self._uncounted[0] += len(rollout.valid)
        self._uncounted[1] += len(rollout.ids)

    @abstractmethod
    def loss(self, experience: Experience) -> StepOutput:
        """The method: one loss of what :meth:`explore` found."""

    @wide_numbers()
    def draw_loss(self, batch: dict[str, Any]) -> Tensor:
        """The loss of one independent estimate of the gradient: samples anew, logs nothing, moves no statistic.

        For measuring the gradient. Its noise is that of the generators as they are; :meth:`training_step` seeds them.
        """
        return self.loss(self.explore(batch)).loss

    # ---- setting up -------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's."""
        return self.policy.tokenizer

    def configure_model(self) -> None:
        """Load policy and rewards; nothing happens the second time."""
        self.policy.load()
        vocabulary = self.policy.base.config.get_text_config().vocab_size
        for reward in self._rewards():
            reward.load(self.tokenizer, vocabulary)

    def setup(self, stage: str) -> None:
        """Check that prompt and completion fit into the context, too."""
        super().setup(stage)
        data = getattr(self._trainer, "datamodule", None)
        longest = getattr(data, "max_prompt_tokens", None)
        completions, flag = self.sampler.max_new_tokens, "--model.sampler.max_new_tokens"
        if self.view == "pairs" and data is not None and data.max_text_tokens > completions:
            completions, flag = data.max_text_tokens, "--data.max_text_tokens"
        self.policy.load()
        room = self.policy.context_length
        if longest is not None and room is not None and longest + completions > room:
            raise InputError(
                f"the model's context is {room} tokens, but prompts may have {longest} (--data.max_prompt_tokens) and "
                f"completions {completions} ({flag}); lower one of them"
            )

    def _rewards(self) -> list[Reward]:
        return [module for module in (self.reward, *self.judges) if isinstance(module, Reward)]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what was spent."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["grade_lightning"]["spent"] = {name: count.cpu() for name, count in self.spent.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint fits; from here on the policy is not its reference."""
        super().on_load_checkpoint(checkpoint)
        self.spent |= checkpoint["grade_lightning"].get("spent", {})
        self._fresh = False

    def frozen_modules(self) -> list[nn.Module]:
        """Reward, judges and the reference."""
        reference = [self.policy.reference] if self.policy.reference is not None else []
        return [self.reward, self.judges, *reference]

    def save_pretrained(self, folder: str, merge: bool = True) -> None:
        """Write the policy with its tokenizer, and settings with which `generate` samples as the sampler does."""
        self.policy.save_pretrained(folder, merge)
        if is_first_process():
            self.sampler.settings(self.policy).save_pretrained(folder)

    # ---- one step ---------------------------------------------------------------------------------------------

    @wide_numbers()
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Sample, score, and let the method make the loss."""
        self._seed("train", batch_idx)
        experience = self.explore(batch)
        return self._finish_step(experience, self.loss(experience))

    def _finish_step(self, experience: Experience, step: StepOutput) -> Tensor:
        # an infinite reward must not pass for a large one, or for the best
        step.loss = step.loss * torch.where(experience.scores.total.isinf().any(), torch.nan, 1.0)
        if self._trainer is not None:
            if self._fresh:
                self._check_first_batch(experience.rollout, step)
                self._fresh = False
            self._log_step(experience.rollout, experience.scores, step)
        return step.loss

    def evidence(self) -> list[dict[str, Any]]:
        """Completions of the latest step, with their rewards."""
        rollout, scores, _ = self.last_rollout
        rows = zip(rollout.prompts, rollout.completions, scores.total.tolist(), strict=True)
        return [{"prompt": p, "completion": c, "reward": r if math.isfinite(r) else str(r)} for p, c, r in rows]

    def _log_step(self, rollout: Rollout, scores: Scores, step: StepOutput) -> None:
        mask = rollout.completion_mask
        kl = sequences.masked_sum(step.kl, mask)
        one = kl.new_ones(())
        tokens, rows = mask.sum(), one * len(kl)
        reward, answered = _answered(scores.total)  # indexing those that answered would wait for the device
        mean = reward / answered.clamp(min=1)
        spread = (scores.total - mean).square().nansum()
        terms = {  # of each figure a sum and what it is divided by, over all processes
            "train/loss": (step.loss, one),
            "train/reward": (reward, answered),
            "train/reward_std": (spread, answered),
            "train/kl": (kl.sum(), rows),
            "train/kl_per_token": (kl.sum(), tokens),
            **{
                f"train/kl_{name}": (sequences.masked_sum(estimate(step.log_ratio), mask).sum(), rows)
                for name, estimate in divergences.ESTIMATORS.items()
            },
            "train/entropy": (sequences.masked_sum(step.entropy, mask).sum(), tokens),
            "train/response_length": (tokens, rows),
            "train/eos_rate": (rollout.ended.sum(), rows),
            **{name if "/" in name else f"train/{name}": (value, one) for name, value in step.metrics.items()},
            **{f"rewards/{name}": _answered(value) for name, value in scores.parts.items()},
            **{name: (one * count, one) for name, count in zip(self.spent, self._uncounted, strict=True)},
        }
        packed = torch.stack([torch.stack([x.detach().float() for x in pair]) for pair in terms.values()])
        every = self._gather(packed.unsqueeze(0))  # (processes, figures, 2); one synchronisation for all
        sums, counts = every.sum(0).unbind(1)
        logged, total = dict(zip(terms, sums / counts, strict=True)), dict(zip(terms, sums, strict=True))
        for name, before in self.spent.items():
            self.spent[name] = before.to(sums.device) + total[name].long()
            logged[f"train/{name}"] = self.spent[name].float()
            del logged[name]
        self._uncounted = [0, 0]
        # to the spread within the processes that of their means; squares less a square would lose it to rounding
        rewards, answers = every[:, list(terms).index("train/reward")].unbind(1)
        apart = (answers * (rewards / answers - logged["train/reward"]).square()).nansum() / answers.sum()
        logged["train/reward_std"] = (logged["train/reward_std"] + apart).sqrt()
        logged["train/objective"] = logged["train/reward"] - self.beta * logged["train/kl"]
        self.log_dict(logged, batch_size=len(kl))
        for name in ("reward", "kl"):
            self.log(name, logged[f"train/{name}"], prog_bar=True, logger=False, batch_size=len(kl))
        self.last_rollout = rollout, scores, kl.detach()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Start the clock, when the batch is a new one."""
        super().on_train_batch_start(batch, batch_idx)
        if batch_idx % self.visits == 0 or self._began is None:
            self._began, self._tokens = time.perf_counter(), 0

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the speed of the whole step: sampling, reward, both passes and the optimizer.

        A batch that is trained on several times counts as sampled once, over the time of all of them.
        """
        rollout, _, _ = self.last_rollout
        self._tokens += int(rollout.completion_mask.sum()) * self.trainer.world_size
        if (batch_idx + 1) % self.visits or self._began is None:
            return
        speed = self._tokens / self.epochs / (time.perf_counter() - self._began)
        self._began = None
        self.log("train/tokens_per_second", speed, batch_size=len(rollout.lengths))
        self.log("tok/s", speed, prog_bar=True, logger=False, batch_size=len(rollout.lengths))

    def _check_first_batch(self, rollout: Rollout, step: StepOutput) -> None:
        """At step 0 the policy is its reference, and the learner's log-probabilities are the sampler's."""
        if self.policy.dropout:
            return
        reduced = "16" in str(self.trainer.precision) or self.policy.dtype in (torch.bfloat16, torch.float16)
        tolerance = 0.1 if reduced else 1e-3
        kl = float(sequences.masked_sum(step.kl, rollout.completion_mask).abs().max())
        gap = float((step.logps - rollout.logps).abs()[rollout.completion_mask].mean())
        if kl > tolerance:
            raise RuntimeError(
                f"KL to the reference at step 0 is {kl:.3g} nats instead of 0: the reference is not the model that the "
                "policy started as (was an adapter merged or loaded into one of them?)"
            )
        if gap > tolerance:
            raise RuntimeError(
                f"log-probabilities of the training pass differ from the sampler's by {gap:.3g} on average: the "
                "completions were not sampled from the policy that is trained"
            )

    # ---- evaluation -------------------------------------------------------------------------------------------

    @torch.no_grad()
    @wide_numbers()
    def evaluate(self, batch: dict[str, Any], stage: Stage, batch_idx: int) -> dict[str, Any]:
        """Sample with a fixed seed and measure each completion.

        Returns:
            The rollout; `reward`, `kl` (nats per sequence), `entropy` (nats per token), `length`, `ended` and
            `ref_nll` (negative log-likelihood under the reference, nats per sequence), each (B,); `parts`, each
            reward's own value.
        """
        with self._fixed_noise(stage, batch_idx):
            rollout = self.sampler(self.policy, **batch)
        with self.policy.evaluating():
            found = self.measure(rollout)
        mask = rollout.completion_mask
        scores = [reward.score(rollout) for reward in self._rewards()]
        parts: dict[str, Tensor] = {}
        for score in scores:
            parts |= {unique_name(name, parts): value for name, value in score.parts.items()}
        return {
            "rollout": rollout,
            "reward": scores[0].total,
            "kl": sequences.masked_sum(found.kl, mask),
            "entropy": sequences.masked_sum(found.entropy, mask) / rollout.lengths,
            "length": rollout.lengths,
            "ended": rollout.ended,
            "ref_nll": -sequences.masked_sum(found.ref_logps, mask),
            "parts": parts,
        }

    def measure(self, rollout: Rollout, known: Measured | None = None, exact_graph: bool = False) -> Measured:
        """One teacher-forced pass of the policy and, unless it is `known`, of its reference.

        Args:
            rollout: completions, the policy's own or others.
            known: earlier measurements, of which all but `logps` (and `values`) are taken over.
            exact_graph: keep the graph of the exact KL.
        """
        inputs, length = self.policy.embed(rollout.ids[:, :-1]), rollout.completion_ids.shape[1]
        return self._measured(rollout, self.policy.hidden(inputs, rollout.mask[:, :-1], length), known, exact_graph)

    def _measured(self, rollout: Rollout, hidden: Tensor, known: Measured | None, exact_graph: bool) -> Measured:
        vocabulary = self.policy.vocabulary(rollout.packed(hidden))
        if known is not None:
            (logps,) = vocabulary.map(lambda logits, rows: islice(self._figures(rollout, logits, rows), 1))
            return replace(known, logps=rollout.unpacked(logps))
        reference = self._reference(rollout)
        columns = vocabulary.map(
            lambda logits, rows: self._figures(rollout, logits, rows, reference),
            differentiable=3 if exact_graph else 2,
        )
        return Measured.of(rollout, columns)

    def _figures(
        self, rollout: Rollout, logits: Tensor, rows: slice, reference: Vocabulary | None = None
    ) -> Iterator[Tensor]:
        sampled, dist = self._distributions(rollout, logits, rows)
        return figures(sampled, dist, lambda: self._reference_distribution(reference, rows), rollout.tokens[rows])

    def _sampled_logits(self, rollout: Rollout, logits: Tensor, rows: slice) -> Tensor:
        """Logits of what was sampled at some of the valid positions, (n, V)."""
        positions = rollout.valid[rows] % rollout.completion_ids.shape[1]
        return self.sampler.logits(logits, rollout.eos_ids, rollout.tokens[rows], positions)

    def _distributions(self, rollout: Rollout, logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Log-probabilities at some of the valid positions, each (n, V): as sampled, and without truncation."""
        sampled = self._sampled_logits(rollout, logits, rows).log_softmax(-1)
        return sampled, self.sampler.log_distribution(logits) if self.sampler.restricts else sampled

    def _reference_distribution(self, reference: Vocabulary | None, rows: slice) -> Tensor:
        assert reference is not None
        return self.sampler.log_distribution(reference.at(rows))

    @torch.no_grad()
    def _reference(self, rollout: Rollout) -> Vocabulary:
        """The reference's logits at the valid positions."""
        inputs, length = self.policy.reference_embed(rollout.ids[:, :-1]), rollout.completion_ids.shape[1]
        hidden = self.policy.reference_hidden(inputs, rollout.mask[:, :-1], length)
        return self.policy.reference_vocabulary(rollout.packed(hidden))

    @contextmanager
    def _fixed_noise(self, stage: Stage, batch_idx: int) -> Iterator[None]:
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            self._seed(stage, batch_idx)
            yield

    def _evaluation_step(self, batch: dict[str, Any], stage: Stage, batch_idx: int) -> dict[str, Any]:
        result = self.evaluate(batch, stage, batch_idx)
        rollout: Rollout = result["rollout"]
        columns = {name: result[name] for name in ("reward", "kl", "entropy", "length", "ended", "ref_nll")}
        columns |= {f"rewards/{name}": value for name, value in result["parts"].items()}
        pad = self.sampler.max_new_tokens - rollout.completion_ids.shape[1]
        columns["tokens"] = nn.functional.pad(rollout.completion_ids, (0, pad))
        for name, value in columns.items():
            self._evaluation.setdefault(name, []).append(value)
        if batch_idx == 0:
            self.last_evaluation = result
        return result

    def _finish_evaluation(self, stage: Stage) -> None:
        table = {name: self._gather(torch.cat(values)) for name, values in self._evaluation.items()}
        self._evaluation.clear()
        if not table:
            return
        reward, length, tokens = table["reward"], table["length"], table.pop("tokens")
        answered = reward[~reward.isnan()]
        spread = answered.std() if len(answered) > 1 else answered.new_zeros(())
        within = torch.arange(tokens.shape[1], device=tokens.device) < length.unsqueeze(1)
        values = {
            "reward": answered.mean(),
            "reward_std": spread,
            "reward_ci95": 1.96 * spread / math.sqrt(max(len(answered), 1)),
            "kl": table["kl"].mean(),
            "kl_per_token": table["kl"].sum() / length.sum(),
            "entropy": (table["entropy"] * length).sum() / length.sum(),
            "response_length": length.float().mean(),
            "eos_rate": table["ended"].float().mean(),
            "distinct_2": reward.new_tensor(sequences.distinct_bigrams(tokens, within)),
            "perplexity": (table["ref_nll"].sum() / length.sum()).exp(),
        }
        values |= {name: value.nanmean() for name, value in table.items() if name.startswith("rewards/")}
        self.log_dict({f"{stage}/{name}": value.float() for name, value in values.items()}, sync_dist=True)

    def _gather(self, rows: Tensor) -> Tensor:
        """The rows of all processes; the sampler gives each the same number."""
        gathered = self.all_gather(rows)
        assert isinstance(gathered, Tensor)
        return gathered.flatten(0, 1) if gathered.dim() > rows.dim() else gathered

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Measure a batch."""
        self._evaluation_step(batch, "val", batch_idx)

    def on_validation_epoch_end(self) -> None:
        """Log the measurements."""
        self._finish_evaluation("val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Measure a batch; for callbacks, what was found."""
        return self._evaluation_step(batch, "test", batch_idx)

    def on_test_epoch_end(self) -> None:
        """Log the measurements."""
        self._finish_evaluation("test")

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """A row for each prompt, as :meth:`rows` makes it."""
        return self.rows(self.evaluate(batch, "predict", batch_idx))

    def rows(self, result: dict[str, Any]) -> list[dict[str, Any]]:
        """What :meth:`evaluate` found, prompt by prompt, for JSON: None where a number is not finite or not there."""
        rollout: Rollout = result["rollout"]
        columns = {name: result[name].tolist() for name in ("reward", "kl", "length", "ended", "ref_nll")}
        parts = {name: value.tolist() for name, value in result["parts"].items()}
        return [
            {"prompt": prompt, "completion": completion}
            | {name: _number(values[i]) for name, values in columns.items()}
            | {"rewards": {name: _number(values[i]) for name, values in parts.items()}}
            for i, (prompt, completion) in enumerate(zip(rollout.prompts, rollout.completions, strict=True))
        ]


def hash_seed(*key: int | str) -> int:
    """A 63-bit seed from integers and names; the same on every machine.

    Example:
        >>> hash_seed(42, "train", 0) == hash_seed(42, "train", 0) != hash_seed(42, "train", 1)
        True
    """
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1


def _keys(root: nn.Module, module: nn.Module) -> list[str]:
    prefix = next(name for name, child in root.named_modules() if child is module)
    return [f"{prefix}.{name}" for name in nn.Module.state_dict(module)]


def _answered(values: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and number of those that are not NaN."""
    return values.nansum(), (~values.isnan()).sum()


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
