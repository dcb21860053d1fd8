"""What does the passive mode of GradientVariance cost?

Every second optimizer step of the same training runs with it, the others without; medians over the steps and their
ratio, for a GPT-2 of 4 × 256 with a vocabulary of 8,000 and random weights: supervised fine-tuning on 16 texts of 96
tokens (nothing but forward, backward and optimizer: the worst case), RLOO and GradeSTE on 16 × (32 + 64) tokens, each
in two micro-batches.

python benchmarks/passive.py
"""

import argparse
import time
from functools import partial
from statistics import median
from typing import Any

import torch
from common import Prompts, Words, policy
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader

from grade_lightning.callbacks import GradientVariance
from grade_lightning.methods import RLOO, GradeSTE
from grade_lightning.policies import Policy
from grade_lightning.rollouts import Sampler

VOCABULARY, PARTS = 8_000, 2


class Switched(GradientVariance):
    """On in every second step; keeps the seconds of all steps."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: tuple[list[float], list[float]] = ([], [])
        self.began = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin a step."""
        if batch_idx % PARTS == 0:
            self.began = time.perf_counter()
        if trainer.global_step % 2:
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        else:
            self._unwatch()

    def on_before_optimizer_step(self, trainer: Trainer, *args: Any) -> None:
        """Of a step that is watched."""
        if trainer.global_step % 2:
            super().on_before_optimizer_step(trainer, *args)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End a step."""
        if trainer.global_step > 2 and (batch_idx + 1) % PARTS == 0:
            self.seconds[(trainer.global_step - 1) % 2].append(time.perf_counter() - self.began)


class FineTuning(LightningModule):
    """Cross-entropy of a text, and nothing else."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy

    def training_step(self, batch: dict[str, Any]) -> Tensor:
        """Next-token loss."""
        ids = batch["input_ids"].repeat(1, 3)
        loss: Tensor = self.policy.model(input_ids=ids, labels=ids).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The methods' own."""
        return torch.optim.AdamW(self.parameters(), lr=3e-4)


def main() -> None:
    """Train three modules, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=42, help="optimizer steps of each; the first two do not count")
    steps = parser.parse_args().steps
    settings: dict[str, Any] = {"reward": Words(VOCABULARY), "sampler": Sampler(max_new_tokens=64)}
    print("| step | without, s | with, s | ratio of medians |")
    print("|---|--:|--:|--:|")
    for name, rows in (("supervised fine-tuning", 8), ("RLOO", 4), ("GradeSTE", 8)):  # RLOO: 4 prompts × 4 in two parts
        seed_everything(0, verbose=False)
        module: LightningModule = FineTuning(policy(VOCABULARY))
        if name != "supervised fine-tuning":
            kind = RLOO if name == "RLOO" else partial(GradeSTE, hops=2)
            module = kind(policy=policy(VOCABULARY), **settings)
        clock = Switched()
        quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
        trainer = Trainer(
            max_steps=steps, accumulate_grad_batches=PARTS, callbacks=[clock], enable_checkpointing=False, **quiet
        )
        trainer.fit(module, DataLoader(Prompts(rows, VOCABULARY), batch_size=None))
        without, with_it = (median(seconds) for seconds in clock.seconds)
        print(f"| {name} | {without:.3f} | {with_it:.3f} | {with_it / without:.3f} |", flush=True)


if __name__ == "__main__":
    main()
