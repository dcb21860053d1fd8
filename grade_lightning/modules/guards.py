"""Guards: what is refused before a run, and kept from the weights."""

import math
from collections.abc import Iterable
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from grade_lightning.errors import InputError
from grade_lightning.records import Batching
from grade_lightning.rewards import ClassifierReward, Reward
from grade_lightning.strategies import FSDP2

BAD_BATCHES = 3
"""Batches in a row without a finite gradient that end a run."""


class StepGuard:
    """Counts the steps whose gradient is not finite, and the latest batches that had no other."""

    def __init__(self) -> None:
        self.skipped = 0
        """Steps that were left out."""
        self._bad: set[tuple[int, int]] = set()

    def passes(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Whether the gradient of a step is finite; counts it if it is not."""
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if bool(norm.isfinite()):
            self._bad.clear()
            return True
        self.skipped += 1
        return False

    def exhausts(self, epoch: int, batch: int) -> bool:
        """Whether too many batches in a row had no finite gradient, this one included.

        Args:
            epoch: of the data.
            batch: number of the batch in it; all steps on one batch count as one.
        """
        self._bad.add((epoch, batch))
        return len(self._bad) == BAD_BATCHES

    def state_dict(self) -> dict[str, Any]:
        """Both counts."""
        return {"skipped": self.skipped, "bad": sorted(self._bad)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self.skipped, self._bad = state.get("skipped", 0), {tuple(batch) for batch in state.get("bad", [])}


def check_strategy(trainer: Trainer) -> None:
    """Check that the strategy can do what the methods do.

    Raises:
        InputError: it cannot.
    """
    strategy = trainer.strategy
    if isinstance(strategy, (FSDPStrategy, ModelParallelStrategy)) and not isinstance(strategy, FSDP2):
        raise InputError(
            f"--trainer.strategy: under {type(strategy).__name__} a method could not call parts of the network by "
            "themselves; use fsdp2, or ddp"
        )


def check_windows(trainer: Trainer, batching: Batching) -> None:
    """For a module that is given the same batch several times in a row: check that its batches stay whole.

    Raises:
        InputError: the number of micro-batches in a step is to change during the run.
    """
    if any(isinstance(callback, GradientAccumulationScheduler) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        raise InputError(
            "GradientAccumulationScheduler: a batch is read for a fixed number of micro-batches; "
            "set --trainer.accumulate_grad_batches instead"
        )
    batches, steps = trainer.num_training_batches, batching.steps_per_batch
    if not math.isinf(batches) and batches % steps:
        rank_zero_warn(
            f"an epoch has {batches} batches, no multiple of the {steps} that are trained on what is read or "
            "sampled at once: the last of each epoch is cut short"
        )


def check_low_rank(optimizer: Optimizer, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Check that an optimizer with a rank is not given the matrices of LoRA.

    Args:
        optimizer: any; ours, GaLore and their kin have a `rank` in their groups.
        parameters: what it trains, by name.

    Raises:
        InputError: it is.
    """
    adapters = {id(p) for name, p in parameters if ".lora_" in name}
    groups = [group for group in optimizer.param_groups if group.get("rank") is not None]
    if any(id(p) in adapters for group in groups for p in group["params"]):
        raise InputError(
            f"--model.optimizer {type(optimizer).__name__}: keeps its moments in low rank, which the matrices of LoRA "
            "have already, so it would save nothing; use torch.optim.AdamW, or leave --model.policy.lora out"
        )


def check_context(room: int | None, *parts: tuple[str, int, str], model: str = "the model") -> None:
    """Check that what a model reads fits into its context.

    Args:
        room: the longest sequence that it takes; None where it does not say.
        *parts: what the sequence is made of: its name, its most tokens, and the option that says how many these are.
        model: what reads it.

    Raises:
        InputError: it does not fit.

    Example:
        >>> check_context(64, ("prompts", 32, "--data.max_prompt_tokens"), ("completions", 32, "--max_new_tokens"))
        >>> check_context(64, ("texts", 128, "--data.max_text_tokens"))
        Traceback (most recent call last):
        ...
        grade_lightning.errors.InputError: the model's context is 64 tokens, but texts may have 128 \
(--data.max_text_tokens); lower it
    """
    if room is not None and sum(tokens for _, tokens, _ in parts) > room:
        (name, tokens, flag), *others = parts
        said = f"{name} may have {tokens} ({flag})" + "".join(f" and {n} {t} ({f})" for n, t, f in others)
        raise InputError(f"{model}'s context is {room} tokens, but {said}; lower {'one of them' if others else 'it'}")


def check_reward(reward: Reward, backpropagates: bool, default_for: str | None = None) -> None:
    """Check that a method can be trained with its reward.

    Args:
        reward: what is maximised.
        backpropagates: whether the method needs its gradient.
        default_for: of which policy it is the reward, if nobody chose it; else None.

    Raises:
        InputError: it cannot; the reward itself says why it has no gradient.
    """
    if default_for is not None and isinstance(reward, ClassifierReward) and reward.foreign is not None:
        raise InputError(
            f"--model.reward: you gave none, and the bundled one has another vocabulary than {default_for}; give "
            "ClassifierReward with --model.reward.path, or FunctionReward with --model.reward.function"
        )
    if backpropagates and not reward.differentiable:
        reward.pathwise(None)  # type: ignore[arg-type]


def check_method(method: str | None, own: str) -> None:
    """Check that the method of a checkpoint is one's own.

    Raises:
        InputError: it is another, or no method of ours.
    """
    if method != own:
        whose = f"of {method}" if method else "not of grade_lightning"
        raise InputError(f"checkpoint: it is {whose}, but --model is {own}; name the model that it was written by")


def check_weights(saved: dict[str, Any], expected: dict[str, Any]) -> None:
    """Check that a checkpoint holds exactly what is trained.

    Raises:
        InputError: it does not.
    """
    there, wanted = ({(name, tuple(value.shape)) for name, value in state.items()} for state in (saved, expected))
    if there != wanted:
        odd = sorted(there ^ wanted)
        raise InputError(
            f"checkpoint: its weights do not fit this model ({len(wanted - there)} are missing, "
            f"{len(there - wanted)} are unknown, such as {odd[0][0]}); give the policy and LoRA settings it had"
        )
