"""Training of the differentiable reward: the stage before alignment."""

from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn.functional import pad
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import BinaryAccuracy, BinaryAUROC, BinaryCalibrationError
from transformers import AutoConfig, PreTrainedTokenizerBase

from grade_lightning.distributed import is_first_process
from grade_lightning.errors import check_range
from grade_lightning.functional.preferences import bradley_terry, centring
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
from grade_lightning.rewards import Classifier, SequenceClassifier


class RewardModel(TrainableModule):
    """A classifier on the policy's own backbone and vocabulary, from labels or from preferences.

    Logs `{stage}/loss` (nats), `{stage}/accuracy` and `{stage}/calibration_error` (expected calibration error over 15
    bins); from labels `{stage}/auroc`, from pairs `{stage}/margin` (mean difference of the scores).

    Args:
        backbone: the language model that the policy will be; a folder, a name on the Hub, or `"bundled"`.
        freeze_backbone: train the head alone.
        learns_from: `labels`: the column `label`, by cross-entropy; `pairs`: the columns `prompt`, `chosen`, `rejected`
            and perhaps `margin`, by Bradley-Terry.
        head: `mean`: the paper's two layers on the mean of the states, for `ClassifierReward`; `last_token`: one layer
            on the last state, as transformers has it, for `SequenceClassifierReward` and other libraries. By default
            `mean` from labels and `last_token` from pairs.
        centring: weight of (r_chosen + r_rejected)², which puts 0 between the scores of pairs.
        hidden: width of the middle layer of the `mean` head.
        dtype: of the backbone's weights; the `mean` head stays in float32. A frozen backbone can be bfloat16.
        optimizer: any torch optimizer by class path.
        lr_scheduler: any torch scheduler; a straight line to zero over the run by default.

    References:
        | GRADE (Nel, 2025), https://arxiv.org/abs/2601.11574
        | Training language models to follow instructions with human feedback (Ouyang et al., 2022),
          https://arxiv.org/abs/2203.02155
    """

    def __init__(
        self,
        backbone: str = "bundled",
        freeze_backbone: bool = False,
        learns_from: Literal["labels", "pairs"] = "labels",
        head: Literal["mean", "last_token"] | None = None,
        centring: float = 0.01,
        hidden: int = 256,
        dtype: str = "float32",
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=5e-4),
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(optimizer, lr_scheduler)
        check_range("[1, inf)", hidden=hidden)
        check_range("[0, inf)", centring=centring)
        self.source = Policy(backbone)
        self.freeze_backbone = freeze_backbone
        self.learns_from = learns_from
        self.head = head or ("mean" if learns_from == "labels" else "last_token")
        self.centring = centring
        self.hidden = hidden
        self.dtype_name = dtype
        self.classifier: Classifier | SequenceClassifier | None = None
        metrics: dict[str, Metric | MetricCollection] = {
            "accuracy": BinaryAccuracy(),
            "calibration_error": BinaryCalibrationError(n_bins=15),
        }
        if learns_from == "labels":
            metrics["auroc"] = BinaryAUROC()
        self.metrics = nn.ModuleDict({s: MetricCollection(metrics).clone(prefix=f"{s}/") for s in ("val", "test")})

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The backbone's."""
        return self.source.tokenizer

    @property
    def batching(self) -> Batching:
        """Texts with labels, or pairs of texts."""
        return Batching("labelled") if self.learns_from == "labels" else Batching("preferences", 2)

    def configure_model(self) -> None:
        """Load the backbone under a new head."""
        if self.classifier is None:
            path, dtype = resolve_model(self.source.path, "policy"), torch_dtype(self.dtype_name)
            body: Any
            if self.head == "mean":
                self.classifier = Classifier.from_backbone(path, self.hidden, dtype)
                body = self.classifier.backbone
            else:
                self.classifier = SequenceClassifier.from_backbone(path, self.tokenizer.pad_token_id, dtype)
                body = self.classifier.model.base_model
            check_vocabulary(self.source.path, body, self.tokenizer)
            self.classifier.train()
            body.requires_grad_(not self.freeze_backbone)

    def check_lengths(self, prompt: int, text: int) -> None:
        """Texts must fit into the backbone's context."""
        config = load_pretrained(AutoConfig, resolve_model(self.source.path, "policy"))
        check_context(context_length(config), ("texts", text, "--data.max_text_tokens"))

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """Logits, (B,); of pairs (2B,), the chosen ones, then the rejected ones."""
        assert self.classifier is not None
        ids, mask = batch["input_ids"], batch["attention_mask"]
        if self.learns_from == "labels":
            return self.classifier.score(ids, mask)
        longest = max(ids.shape[1], batch["rejected_ids"].shape[1])
        both = (ids, batch["rejected_ids"]), (mask, batch["rejected_mask"])
        ids, mask = (torch.cat([pad(x, (0, longest - x.shape[1])) for x in parts]) for parts in both)
        return self.classifier.score(ids, mask)

    def draw_loss(self, batch: dict[str, Any]) -> Tensor:
        """The loss, nats; its noise is that of the generators as they are."""
        return self._loss(self(batch), batch)

    def _loss(self, logits: Tensor, batch: dict[str, Any]) -> Tensor:
        """Cross-entropy of the labels, or Bradley-Terry with centring."""
        if self.learns_from == "labels":
            return nn.functional.binary_cross_entropy_with_logits(logits, batch["labels"].to(logits.dtype))
        chosen, rejected = logits.chunk(2)
        margins = batch["margins"].to(logits.dtype)
        return (bradley_terry(chosen, rejected, margins) + self.centring * centring(chosen, rejected)).mean()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """One batch of labelled text, or of pairs."""
        self.seed("train", batch_idx)
        logits = self(batch)
        loss = self._loss(logits, batch)
        self.log("train/loss", loss, prog_bar=True)
        if self.learns_from == "pairs":
            chosen, rejected = logits.detach().chunk(2)
            self.log("train/accuracy", (chosen > rejected).float().mean(), prog_bar=True)
            self.log("train/margin", (chosen - rejected).mean())
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """One batch of labelled text, or of pairs."""
        self._measure("val", batch)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """One batch of labelled text, or of pairs."""
        self._measure("test", batch)

    def _measure(self, stage: str, batch: dict[str, Any]) -> None:
        logits, rows = self(batch).float(), len(batch["input_ids"])
        figures = {f"{stage}/loss": self._loss(logits, batch)}
        metrics = self.metrics[stage]
        assert isinstance(metrics, MetricCollection)
        if self.learns_from == "labels":
            metrics.update(logits.sigmoid(), batch["labels"])
        else:  # each pair in both orders: otherwise the right answer would always be 1
            chosen, rejected = logits.chunk(2)
            difference = chosen - rejected
            figures[f"{stage}/margin"] = difference.mean()
            right = torch.ones_like(difference, dtype=torch.int64)
            metrics.update(torch.cat([difference, -difference]).sigmoid(), torch.cat([right, 1 - right]))
        self.log_dict(figures, sync_dist=True, batch_size=rows)
        self.log_dict(metrics, batch_size=rows)

    def frozen_modules(self) -> list[nn.Module]:
        """The metrics."""
        return [self.metrics]

    def save_pretrained(self, folder: str, merge: bool = True) -> None:
        """Write a folder for `ClassifierReward` or `SequenceClassifierReward`, with the tokenizer; without adapters."""
        assert self.classifier is not None
        self.classifier.save_pretrained(folder)
        if is_first_process():
            self.tokenizer.save_pretrained(folder)
