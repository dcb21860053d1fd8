"""Supervised fine-tuning: the stage before alignment."""

from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grade_lightning.functional import sequences
from grade_lightning.modules import TrainableModule
from grade_lightning.modules.guards import check_context
from grade_lightning.policies import PolicyLike, as_policy
from grade_lightning.records import Batching


class SupervisedFineTuning(TrainableModule):
    """Next-token prediction: on all of a text, on a prompt's completion, or on what the assistant says.

    Logs `{stage}/loss` (nats per token) and `{stage}/perplexity`. With gradient accumulation a batch holds the texts of
    the whole optimizer step, and each of its micro-batches is a part of it; TextDataModule gives it out as often.

    Args:
        policy: the language model.
        optimizer: any torch optimizer by class path.
        lr_scheduler: any torch scheduler; a straight line to zero over the run by default.
    """

    def __init__(
        self,
        policy: PolicyLike | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-3),
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(optimizer, lr_scheduler)
        self.policy = as_policy(policy)
        self._seen: list[Tensor] = []

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's."""
        return self.policy.tokenizer

    def configure_model(self) -> None:
        """Load the policy; supervised training has no reference."""
        self.policy.load(reference=False)

    def check_lengths(self, prompt: int, text: int) -> None:
        """Texts must fit into the context."""
        self.configure_model()
        check_context(self.policy.context_length, ("texts", text, "--data.max_text_tokens"))

    @property
    def batching(self) -> Batching:
        """Texts of an optimizer step, so that the tokens of all its micro-batches can be counted."""
        return Batching("text", accumulation=self.accumulation())

    def draw_loss(self, batch: dict[str, Any]) -> Tensor:
        """The loss of one estimate of the gradient, whose noise is that of the generators as they are."""
        return self.loss(batch)

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """Mean negative log-likelihood of the tokens that are learned, nats."""
        return self._nll(batch) / _targets(batch).sum().clamp(min=1)

    def _nll(self, batch: dict[str, Any]) -> Tensor:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        inputs = self.policy.embed(ids[:, :-1])
        valid = _targets(batch).bool()
        tokens = ids[:, 1:][valid]
        vocabulary = self.policy.vocabulary(self.policy.hidden(inputs, mask[:, :-1], ids.shape[1] - 1)[valid])

        (logps,) = vocabulary.map(
            lambda logits, rows: [sequences.token_logps(logits.float().log_softmax(-1), tokens[rows])]
        )
        return -logps.sum()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """One micro-batch; each token of the optimizer step weighs the same, wherever it is."""
        self.seed("train", batch_idx)
        parts = self.batching.steps_per_batch
        rows = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
        part = {name: value.chunk(parts)[batch_idx % parts] for name, value in rows.items()}
        loss = self._nll(part) / self.reduce.mean(_targets(batch).sum() / parts).clamp(min=1 / parts)
        self.log("train/loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """One batch of text."""
        self._measure(batch)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """One batch of text."""
        self._measure(batch)

    def _measure(self, batch: dict[str, Any]) -> None:
        self._seen.append(torch.stack([self._nll(batch).float(), _targets(batch).sum()]))

    def _finish(self, stage: str) -> None:
        nll, tokens = self.all_gather(torch.stack(self._seen)).reshape(-1, 2).sum(0)  # type: ignore[union-attr]
        self._seen.clear()
        self.log_dict({f"{stage}/loss": nll / tokens, f"{stage}/perplexity": (nll / tokens).exp()})

    def on_validation_epoch_end(self) -> None:
        """Log the means over all tokens."""
        self._finish("val")

    def on_test_epoch_end(self) -> None:
        """Log the means over all tokens."""
        self._finish("test")

    def save_pretrained(self, folder: str, merge: bool = True) -> None:
        """Write a Hugging Face folder."""
        self.policy.save_pretrained(folder, merge)


def _targets(batch: dict[str, Any]) -> Tensor:
    """1 for each token after the first that is learned, (B, T − 1)."""
    mask: Tensor = batch.get("loss_mask", batch["attention_mask"])
    return mask[:, 1:].float()
