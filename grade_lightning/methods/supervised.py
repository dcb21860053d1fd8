"""Supervised fine-tuning: the stage before alignment."""

from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grade_lightning.functional import sequences
from grade_lightning.module import TrainableModule
from grade_lightning.policies import Policy


class SupervisedFineTuning(TrainableModule):
    """Next-token prediction on plain text.

    Logs `{stage}/loss` (nats per token) and `{stage}/perplexity`.

    Args:
        policy: the language model.
        optimizer: any torch optimizer by class path.
        lr_scheduler: any torch scheduler.
    """

    view = "text"

    def __init__(
        self,
        policy: Policy | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-3),
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(optimizer, lr_scheduler)
        self.policy = policy or Policy()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's."""
        return self.policy.tokenizer

    def configure_model(self) -> None:
        """Load the policy; supervised training has no reference."""
        self.policy.load(reference=False)

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """Mean negative log-likelihood of the tokens after the first, nats."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        inputs = self.policy.embed(ids[:, :-1])
        logits = self.policy(inputs, mask[:, :-1], ids.shape[1] - 1)
        logps: Tensor = sequences.token_logps(logits.float().log_softmax(-1), ids[:, 1:])
        loss: Tensor = -sequences.masked_sum(logps, mask[:, 1:].bool()).sum() / mask[:, 1:].sum()
        return loss

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """One batch of text."""
        loss = self.loss(batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """One batch of text."""
        self._log("val", batch)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """One batch of text."""
        self._log("test", batch)

    def _log(self, stage: str, batch: dict[str, Any]) -> None:
        loss = self.loss(batch)
        size = len(batch["input_ids"])
        self.log(f"{stage}/loss", loss, prog_bar=True, sync_dist=True, batch_size=size)
        self.log(f"{stage}/perplexity", loss.exp(), sync_dist=True, batch_size=size)

    def save_pretrained(self, folder: str) -> None:
        """Write a Hugging Face folder."""
        self.policy.save_pretrained(folder)
