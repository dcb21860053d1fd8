"""Completions and a histogram of rewards, for any logger."""

import re
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from grade_lightning.callbacks.loggers import log_histogram, log_table
from grade_lightning.errors import check_range
from grade_lightning.modules import AlignmentModule
from grade_lightning.records import Rollout, spoken


class Completions(Callback):
    """Write a table (prompt, completion, reward, KL) and the rewards as a histogram, in each logger's form for it.

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
        step = trainer.fit_loop.epoch_loop._batches_that_stepped  # where Lightning puts the scalars of the moment
        if trainer.loggers and trainer.is_global_zero:
            columns = zip(rollout.prompts, rollout.completions, reward.tolist(), kl.tolist(), strict=True)
            rows = [dict(zip(COLUMNS, row, strict=True)) for row in list(columns)[: self.rows]]
            log_table(trainer, f"{stage}/completions", rows, completion_table(rollout, reward, kl, self.rows), step)
            log_histogram(trainer, f"{stage}/rewards", reward[reward.abs() < 1e19], step)  # TensorBoard's largest


COLUMNS = ("prompt", "completion", "reward", "KL (nats)")


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
