"""TrainableModule: optimizers over what is trained, checkpoints of what is trained, seeds; for every module of ours."""

import json
import math
import os
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedTokenizerBase

from grade_lightning.distributed import Reduce
from grade_lightning.errors import DivergenceError, InputError
from grade_lightning.files import write_atomically
from grade_lightning.numerics import hash_seed, seed_generators
from grade_lightning.policies import Policy
from grade_lightning.policies.endings import end_ids
from grade_lightning.policies.low_bit import owner
from grade_lightning.records import Batching

from .guards import BAD_BATCHES, StepGuard, check_low_rank, check_method, check_strategy, check_weights, check_windows

Stage = Literal["train", "val", "test", "predict"]


class TrainableModule(LightningModule):
    """What every module of this library shares.

    Args:
        optimizer: any torch optimizer by class path; it is handed the trainable parameters alone.
        lr_scheduler: any torch scheduler; stepped after each optimizer step. By default a straight line to zero over
            the run, as in transformers and TRL (constant: `torch.optim.lr_scheduler.ConstantLR` with `factor: 1`).
    """

    unrolls: ClassVar[bool] = False
    """Whether a step's graph goes through the network more than once."""
    has_gradient: ClassVar[bool] = True
    """Whether a step is made of the loss's gradient. That of a search is not, and there is none to measure."""
    loss_is_objective: ClassVar[bool] = True
    """Whether the *value* of the loss is what training lowers. Of policy gradients only the gradient has a meaning."""

    def __init__(self, optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable | None) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.strict_loading = False  # `on_load_checkpoint` is stricter
        self.guard = StepGuard()

    @property
    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Tokenizer for the data."""

    @abstractmethod
    def save_pretrained(self, folder: str, merge: bool = True) -> None:
        """Write what was trained as a Hugging Face folder; adapters are merged into the weights, or written alone.

        Where it is spread over processes, all of them must call this.
        """

    def usage(self) -> str | None:
        """What the model card says of how it is loaded; None: as every model of its kind."""
        return None

    @abstractmethod
    def draw_loss(self, batch: dict[str, Any]) -> Tensor:
        """The loss of one independent estimate of the gradient: draws anew, logs nothing, moves no statistic.

        For measuring the gradient. Its noise is that of the generators as they are; `training_step` seeds them.
        """

    @property
    def batching(self) -> Batching:
        """What a batch of the loader is to this module."""
        return Batching()

    @property
    def eos_ids(self) -> list[int]:
        """Tokens that end a text."""
        policy = getattr(self, "policy", None)
        if isinstance(policy, Policy) and policy.model is not None:
            return policy.eos_ids
        return end_ids(self.tokenizer)

    def prompt_room(self, text: int) -> int | None:
        """Most tokens of a prompt for which the model's context has room; None where there is no limit.

        Args:
            text: most tokens of a completion of the data.
        """
        return None

    def check_lengths(self, prompt: int, text: int) -> None:
        """Check that the data fit into the model's context; the DataModule calls it.

        Args:
            prompt: most tokens of a prompt.
            text: most tokens of a whole text, or of a completion of the data.

        Raises:
            InputError: they do not.
        """

    # ---- the run ------------------------------------------------------------------------------------------------

    @property
    def reduce(self) -> Reduce:
        """Statistics over all processes of the run."""
        return Reduce(self._trainer)

    def total_steps(self) -> int:
        """Optimizer steps of the whole run; 0 where it has no known end."""
        if self._trainer is None:
            return 0
        steps = self.trainer.estimated_stepping_batches
        return 0 if math.isinf(steps) else max(0, int(steps))

    def accumulation(self) -> int:
        """Micro-batches of an optimizer step."""
        return 1 if self._trainer is None else self.trainer.accumulate_grad_batches

    def setup(self, stage: str) -> None:
        """Check the strategy."""
        check_strategy(self.trainer)

    def on_train_start(self) -> None:
        """Check that batches which are trained on several times stay whole."""
        if self.batching.accumulation is not None:
            check_windows(self.trainer, self.batching)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Log how many steps were left out so far."""
        self._batch = batch
        self.log("train/skipped_steps", float(self.guard.skipped))

    def seed(self, stage: Stage, batch_idx: int) -> None:
        """Tie a step's randomness to (seed, stage, step, micro-batch, rank): a resumed run draws the same."""
        step = self.global_step if stage == "train" and self._trainer is not None else 0
        rank = self.global_rank if self._trainer is not None else 0
        seed = hash_seed(int(os.environ.get("PL_GLOBAL_SEED", "0")), stage, step, batch_idx, rank)
        seed_generators(seed)

    # ---- optimizer ----------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """Optimizer and scheduler over the parameters that require grad.

        Raises:
            InputError: their arguments are not what they take, or the scheduler reads a loss that is no objective.
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
        except InputError:
            raise
        except (TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{reason}; check --model.optimizer and --model.lr_scheduler") from error
        check_low_rank(optimizer, self.named_parameters())
        settings: dict[str, Any] = {"scheduler": scheduler, "interval": "step"}
        if isinstance(scheduler, ReduceLROnPlateau):
            if scheduler.monitor == "train/loss" and not self.loss_is_objective:
                raise InputError(
                    f"--model.lr_scheduler: ReduceLROnPlateau would read train/loss, and of {type(self).__name__}'s "
                    "loss only the gradient means something; monitor train/reward or val/reward"
                )
            settings |= {"monitor": scheduler.monitor, "strict": False}  # a validation's metric comes later
        return {"optimizer": optimizer, "lr_scheduler": settings}

    def learning_rate(self) -> float:
        """Of the next step; outside of a run, the optimizer's own."""
        given = self._trainer is not None and self.trainer.optimizers
        optimizer = self.trainer.optimizers[0] if given else self.optimizer([nn.Parameter(torch.zeros(1))])
        return float(optimizer.param_groups[0]["lr"])

    def _remaining(self, step: int) -> float:
        """The part of the run that is left; all of it where it has no known end."""
        # asked for the total before it has restored its loops, Lightning makes a loader that never finds its place
        steps = self.total_steps() if step > 0 else 0
        return max(0.0, 1 - step / steps) if steps > 0 else 1.0

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Leave out a step whose gradient is not finite, so that the weights stay finite.

        Raises:
            DivergenceError: there was no other on the latest three batches.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if self.guard.passes(parameters):
            return
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            return  # in 16 bits it leaves the step out itself, and looks for its scale
        for parameter in parameters:
            parameter.grad = None
        number = self.trainer.fit_loop.epoch_loop.batch_idx // self.batching.steps_per_batch
        if self.guard.exhausts(self.trainer.current_epoch, number):
            raise DivergenceError(
                f"{BAD_BATCHES} batches in a row gave gradients that are not finite, the last at step "
                f"{self.global_step}; the weights are those before them. What the last was made of lies in "
                f"{self._save_evidence()}; lower --model.optimizer.lr or look at the reward and the data"
            )

    def _save_evidence(self) -> Path:
        folder = Path(self.trainer.log_dir or self.trainer.default_root_dir)
        path = folder / f"not_finite_step_{self.global_step}_rank_{self.global_rank}.json"
        folder.mkdir(parents=True, exist_ok=True)
        return write_atomically(path, json.dumps(self.evidence(), indent=1, ensure_ascii=False))

    def evidence(self) -> list[dict[str, Any]]:
        """What the latest batch was, row by row: for those who ask why it gave no finite gradient."""
        texts = self.tokenizer.batch_decode(self._batch["input_ids"], skip_special_tokens=True)
        return [{"text": text} for text in texts]

    # ---- checkpoints --------------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Only what is trained; frozen weights come from where they came from before."""
        state = super().state_dict(*args, **kwargs)
        frozen = {name for name, p in self.named_parameters(remove_duplicate=False) if not p.requires_grad}
        frozen |= {name for module in self.frozen_modules() for name in _keys(self, module)}
        return {name: value for name, value in state.items() if owner(name) not in frozen}

    def frozen_modules(self) -> list[nn.Module]:
        """Modules that are never trained and never saved."""
        return []

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Name the method, so that no other method loads it by mistake."""
        own = {"method": type(self).__name__, "processes": self.reduce.processes}
        checkpoint["grade_lightning"] = own | self.guard.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint is this method's and holds exactly what is trained.

        Raises:
            InputError: it is not, or does not.
        """
        check_method(checkpoint.get("grade_lightning", {}).get("method"), type(self).__name__)
        own = checkpoint["grade_lightning"]
        self.guard.load_state_dict(own)
        check_weights(checkpoint["state_dict"], self.state_dict())
        saved_by, now = own.get("processes", 1), self.reduce.processes
        if saved_by != now and self._trainer is not None and self.trainer.training:
            rank_zero_warn(
                f"checkpoint: it is of {saved_by} processes and this run has {now}. Weights, optimizer, schedule and "
                "running statistics are resumed as they were, and the data at their next row; the noise is that of "
                f"{now}, and a window of completions that was begun is dropped"
            )


def batching_of(module: LightningModule) -> Batching:
    """What a batch is to any module; to one that is not of this library, what each step is given."""
    return module.batching if isinstance(module, TrainableModule) else Batching()


def _keys(root: nn.Module, module: nn.Module) -> list[str]:
    prefix = next(name for name, child in root.named_modules() if child is module)
    return [f"{prefix}.{name}" for name in nn.Module.state_dict(module)]
