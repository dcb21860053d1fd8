"""Training of the differentiable reward: the stage before alignment."""

from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import BinaryAccuracy, BinaryAUROC, BinaryCalibrationError
from transformers import AutoConfig, PreTrainedTokenizerBase

from grade_lightning.distributed import is_first_process
from grade_lightning.errors import check_range
from grade_lightning.modules import TrainableModule
from grade_lightning.modules.guards import check_context
from grade_lightning.policies import Policy
from grade_lightning.policies.context import context_length
from grade_lightning.policies.loading import (
    check_vocabulary,
    load_pretrained,
    resolve_model,
    torch_dtype,
)
from grade_lightning.records import Batching
from grade_lightning.rewards import Classifier


class RewardModel(TrainableModule):
    """A sentiment classifier on the policy's own backbone and vocabulary.

    Logs `{stage}/loss` (binary cross-entropy, nats), `{stage}/accuracy`, `{stage}/auroc` and
    `{stage}/calibration_error` (expected calibration error over 15 bins).

    Args:
        backbone: the language model that the policy will be; a folder, a name on the Hub, or `"bundled"`.
        freeze_backbone: train the head alone.
        hidden: width of the head's middle layer.
        dtype: of the backbone's weights; the head stays in float32. A frozen backbone can be bfloat16.
        optimizer: any torch optimizer by class path.
        lr_scheduler: any torch scheduler; a straight line to zero over the run by default.

    References:
        | GRADE (Nel, 2025), https://arxiv.org/abs/2601.11574
    """

    def __init__(
        self,
        backbone: str = "bundled",
        freeze_backbone: bool = False,
        hidden: int = 256,
        dtype: str = "float32",
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=5e-4),
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(optimizer, lr_scheduler)
        check_range("[1, inf)", hidden=hidden)
        self.source = Policy(backbone)
        self.freeze_backbone = freeze_backbone
        self.hidden = hidden
        self.dtype_name = dtype
        self.classifier: Classifier | None = None
        metrics: dict[str, Metric | MetricCollection] = {
            "accuracy": BinaryAccuracy(),
            "auroc": BinaryAUROC(),
            "calibration_error": BinaryCalibrationError(n_bins=15),
        }
        self.metrics = nn.ModuleDict({s: MetricCollection(metrics).clone(prefix=f"{s}/") for s in ("val", "test")})

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The backbone's."""
        return self.source.tokenizer

    @property
    def batching(self) -> Batching:
        """Texts with labels."""
        return Batching("labelled")

    def configure_model(self) -> None:
        """Load the backbone under a new head."""
        if self.classifier is None:
            self.classifier = Classifier.from_backbone(
                resolve_model(self.source.path, "policy"), self.hidden, torch_dtype(self.dtype_name)
            )
            check_vocabulary(self.source.path, self.classifier.backbone, self.tokenizer)
            self.classifier.train()
            self.classifier.backbone.requires_grad_(not self.freeze_backbone)

    def check_lengths(self, prompt: int, text: int) -> None:
        """Texts must fit into the backbone's context."""
        config = load_pretrained(AutoConfig, resolve_model(self.source.path, "policy"))
        check_context(context_length(config), ("texts", text, "--data.max_text_tokens"))

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """Logits of "positive", (B,)."""
        assert self.classifier is not None
        logits: Tensor = self.classifier(self.classifier.embed(batch["input_ids"]), batch["attention_mask"])
        return logits

    def draw_loss(self, batch: dict[str, Any]) -> Tensor:
        """Cross-entropy, nats; its noise is that of the generators as they are."""
        return nn.functional.binary_cross_entropy_with_logits(self(batch), batch["labels"].float())

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """One batch of labelled text."""
        self.seed("train", batch_idx)
        loss = self.draw_loss(batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """One batch of labelled text."""
        self._measure("val", batch)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """One batch of labelled text."""
        self._measure("test", batch)

    def _measure(self, stage: str, batch: dict[str, Any]) -> None:
        logits, labels = self(batch).float(), batch["labels"]
        loss = nn.functional.binary_cross_entropy_with_logits(logits, labels.float())
        metrics = self.metrics[stage]
        assert isinstance(metrics, MetricCollection)
        metrics.update(logits.sigmoid(), labels)
        self.log(f"{stage}/loss", loss, sync_dist=True, batch_size=len(labels))
        self.log_dict(metrics, batch_size=len(labels))

    def frozen_modules(self) -> list[nn.Module]:
        """The metrics."""
        return [self.metrics]

    def save_pretrained(self, folder: str, merge: bool = True) -> None:
        """Write a folder for `ClassifierReward`, with the tokenizer; there are no adapters."""
        assert self.classifier is not None
        self.classifier.save_pretrained(folder)
        if is_first_process():
            self.tokenizer.save_pretrained(folder)
