"""Settings with which a batch fits that is too large, measured as the batch was."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lightning.pytorch import Trainer

from grade_lightning.modules import TrainableModule
from grade_lightning.policies import ChunkedPass, Policy

from .inventory import smallest_batch
from .memory import Memory
from .tables import readable_size


def remedies(
    trainer: Trainer, module: TrainableModule, size: int, room: float, measure: Callable[[int], Memory]
) -> list[str]:
    """What to set, so that as many sequences as before make a step; empty if none of it is enough.

    Args:
        trainer: that of the run.
        module: the method.
        size: `data.batch_size`, which is too large.
        room: bytes that there are.
        measure: measures with the settings as they are then, given a batch size.
    """
    found, given = [], trainer.accumulate_grad_batches
    for parts in (count for count in (2, 4, 8, 16) if size % count == 0):
        with _micro_batches(trainer, given * parts):
            part = size // parts
            if part % smallest_batch(module, part) == 0 and measure(part).largest(room) >= part:
                found.append(
                    f"set --data.batch_size {part} --trainer.accumulate_grad_batches {given * parts}, with as "
                    "many sequences in a step"
                )
                break
    policy = getattr(module, "policy", None)
    if isinstance(policy, Policy) and _can_checkpoint(policy):
        with _checkpointing(policy):
            memory = measure(size)
        if memory.largest(room) >= size:
            needed = readable_size(memory.total(size))
            found.append(
                f"set --model.policy.gradient_checkpointing true, with which it needs {needed} and the training pass "
                "more time"
            )
    return found


@contextmanager
def _micro_batches(trainer: Trainer, count: int) -> Iterator[None]:
    before, trainer.accumulate_grad_batches = trainer.accumulate_grad_batches, count
    try:
        yield
    finally:
        trainer.accumulate_grad_batches = before


def _can_checkpoint(policy: Policy) -> bool:
    itself = policy.gradient_checkpointing or isinstance(policy.training_pass, ChunkedPass)
    return policy.base.supports_gradient_checkpointing and not itself


@contextmanager
def _checkpointing(policy: Policy) -> Iterator[None]:
    policy.checkpoint_activations()
    try:
        yield
    finally:
        policy.model.gradient_checkpointing_disable()
