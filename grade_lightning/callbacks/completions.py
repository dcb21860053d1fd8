"""Completions and a histogram of rewards in TensorBoard."""

import re
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from grade_lightning.errors import check_range
from grade_lightning.modules import AlignmentModule
from grade_lightning.records import Rollout, spoken


class Completions(Callback):
    """Write a table (prompt, completion, reward, KL) as text, and the rewards as a histogram.

    Args:
        every_n_steps: how often while training; validation and testing write once each time.
        rows: completions in a table.
    """

    def __init__(self, every_n_steps: int = 50, rows: int = 8) -> None:
        check_range("[1, inf)", "completions", every_n_steps=every_n_steps, rows=rows)
        self.every_n_steps = every_n_steps
        self.rows = rows
        self._written = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write what was sampled."""
        due = trainer.global_step != self._written and (trainer.global_step - 1) % self.every_n_steps == 0
        if isinstance(pl_module, AlignmentModule) and due and not trainer.fit_loop._should_accumulate():
            self._written = trainer.global_step
            rollout, scores, kl = pl_module.last_rollout
            self._write(trainer, "train", rollout, scores.total, kl)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the first batch."""
        self._write_evaluation(trainer, pl_module, "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the first batch."""
        self._write_evaluation(trainer, pl_module, "test")

    def _write_evaluation(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        if isinstance(module, AlignmentModule) and not trainer.sanity_checking:
            found = module.last_evaluation
            self._write(trainer, stage, found.rollout, found.reward, found.kl)

    def _write(self, trainer: Trainer, stage: str, rollout: Rollout, reward: Tensor, kl: Tensor) -> None:
        if not trainer.is_global_zero or not isinstance(trainer.logger, TensorBoardLogger):
            return
        writer = trainer.logger.experiment
        step = trainer.fit_loop.epoch_loop._batches_that_stepped  # where Lightning puts the scalars of the moment
        writer.add_text(f"{stage}/completions", completion_table(rollout, reward, kl, self.rows), step)
        answered = reward[reward.abs() < 1e19]  # TensorBoard knows no larger numbers
        if len(answered):
            writer.add_histogram(f"{stage}/rewards", answered.float().cpu(), step)


def completion_table(rollout: Rollout, reward: Tensor, kl: Tensor, rows: int) -> str:
    """A Markdown table of the first `rows` completions; of several turns each begins a line, with who speaks."""
    lines = ["| prompt | completion | reward | KL (nats) |", "|---|---|--:|--:|"]
    for prompt, parts, r, k in list(zip(rollout.prompts, spoken(rollout), reward, kl, strict=True))[:rows]:
        said = [_cell(text) if rollout.turns is None else f"**{who}:** {_cell(text)}" for who, text in parts]
        lines.append(f"| {_cell(prompt)} | {'<br>'.join(said)} | {float(r):.3f} | {float(k):.2f} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    """In one line, with the characters by which Markdown ends a cell or changes its type."""
    return " ".join(re.sub(r"([|*_`])", r"\\\1", text).split())
