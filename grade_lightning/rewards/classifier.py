"""The differentiable classifier of the paper: a language model's body, mean pooling, a two-layer head."""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from grade_lightning.distributed import gather_full_state, is_first_process
from grade_lightning.errors import InputError
from grade_lightning.functional.sequences import position_ids
from grade_lightning.numerics import widened
from grade_lightning.policies.anatomy import examine_backbone
from grade_lightning.policies.loading import (
    config_without_dropout,
    load_pretrained,
)
from grade_lightning.policies.modes import evaluating

from .network import NetworkReward

HEAD_WEIGHTS, HEAD_CONFIG = "reward_head.safetensors", "reward_head.json"


class Classifier(nn.Module):
    """Body of a language model, mean over the tokens, two linear layers: the logit of "positive".

    Args:
        backbone: a transformers model that returns hidden states.
        hidden: width of the head's middle layer.

    References:
        | GRADE (Nel, 2025), https://arxiv.org/abs/2601.11574
    """

    def __init__(self, backbone: PreTrainedModel, hidden: int = 256) -> None:
        super().__init__()
        self.backbone = backbone
        self.hidden = hidden
        with evaluating(backbone):
            width = examine_backbone(backbone, backbone.config.name_or_path or "reward")
        self.head = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, 1))

    def embed(self, ids: Tensor) -> Tensor:
        """Input embeddings, (…) → (…, width)."""
        embeddings: Tensor = self.backbone.get_input_embeddings()(ids)
        return embeddings

    def forward(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """Logits of "positive".

        Args:
            embeddings: (B, L, width).
            mask: (B, L), 0 for padding.

        Returns:
            (B,)
        """
        states, keep = self._states(embeddings, mask)
        logits: Tensor = self.head(states.sum(1) / keep.sum(1)).squeeze(-1)
        return logits

    def along(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """Logits of the text up to each position, (B, L); of embeddings and mask as above."""
        states, keep = self._states(embeddings, mask)
        logits: Tensor = self.head(states.cumsum(1) / keep.cumsum(1).clamp(min=1)).squeeze(-1)
        return logits

    def _states(self, embeddings: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states, 0 at padding, and the mask, (B, L, 1)."""
        states = self.backbone(
            inputs_embeds=embeddings, attention_mask=mask, position_ids=position_ids(mask), use_cache=False
        ).last_hidden_state
        states = states.to(next(self.head.parameters()).dtype)
        keep = mask.unsqueeze(-1).to(states.dtype)
        return states * keep, keep

    def score(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The logit, (B,), of ids and mask (B, L)."""
        logits: Tensor = self(self.embed(ids), mask)
        return logits

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the backbone as a Hugging Face folder, with the head beside it; by all processes, as a policy's."""
        folder = Path(folder)
        backbone, head = gather_full_state(self.backbone.state_dict()), gather_full_state(self.head.state_dict())
        if is_first_process():
            self.backbone.save_pretrained(folder, state_dict=backbone)
            save_file(head, folder / HEAD_WEIGHTS)
            (folder / HEAD_CONFIG).write_text(json.dumps({"hidden": self.hidden, "pooling": "mean"}, indent=2) + "\n")

    @classmethod
    def from_backbone(cls, path: str, hidden: int = 256, dtype: torch.dtype = torch.float32) -> "Classifier":
        """A new head on the body of the model at `path`; dropout is off."""
        config = config_without_dropout(path)
        return cls(load_pretrained(AutoModel, path, config=config, dtype=dtype, use_safetensors=True), hidden)

    @classmethod
    def from_pretrained(cls, path: str, dtype: torch.dtype = torch.float32) -> "Classifier":
        """Read what :meth:`save_pretrained` wrote.

        Raises:
            InputError: the folder has no head, or a damaged one.
        """
        folder = Path(path)
        if not (folder / HEAD_CONFIG).is_file():
            raise InputError(
                f"{path}: holds no {HEAD_CONFIG}, so it is not a reward model with a mean-pooled head; train one with "
                "grade-fit --model RewardModel and name its folder, or read a classifier of transformers by "
                "SequenceClassifierReward"
            )
        try:
            settings: dict[str, Any] = json.loads((folder / HEAD_CONFIG).read_text())
            classifier = cls.from_backbone(path, hidden=settings["hidden"], dtype=dtype)
            classifier.head.load_state_dict(load_file(folder / HEAD_WEIGHTS))
        except InputError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{path}: the reward head cannot be read ({reason}); train it again") from error
        return classifier


class ClassifierReward(NetworkReward):
    """P(positive), or its logit, by a classifier.

    Differentiable if it shares the policy's vocabulary. Else the completion is decoded and read in the classifier's own
    tokens, which gives the exact score and no gradient.

    Args:
        path: folder written by `RewardModel`, or `"bundled"`.
        output: `probability` in [0, 1] as in the paper, or the unbounded `logit`.
        dtype: of the backbone's weights; the head stays in float32.
    """

    def __init__(
        self,
        path: str = "bundled",
        output: Literal["probability", "logit"] = "probability",
        dtype: str = "float32",
    ) -> None:
        super().__init__(path, dtype)
        self.output = output
        self.classifier: Classifier | None = None

    @classmethod
    def from_classifier(
        cls, classifier: Classifier, output: Literal["probability", "logit"] = "probability"
    ) -> "ClassifierReward":
        """Use a classifier that is in memory already."""
        reward = cls(path="memory", output=output)
        reward.classifier = classifier.requires_grad_(False).eval()
        return reward

    def read(self, path: str, tokenizer: PreTrainedTokenizerBase) -> None:
        """Read the classifier."""
        self.classifier = Classifier.from_pretrained(path, self.dtype)

    @property
    def network(self) -> PreTrainedModel | None:
        """The classifier's body."""
        return None if self.classifier is None else self.classifier.backbone

    def score_embeddings(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """P(positive) or the logit, (B,), in float32 or better."""
        assert self.classifier is not None
        return self._output(self.classifier(embeddings, mask))

    def along(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """The same of the text up to each position, (B, L)."""
        assert self.classifier is not None
        return self._output(self.classifier.along(embeddings, mask))

    def _output(self, logits: Tensor) -> Tensor:
        found: Tensor = widened(logits)
        return found.sigmoid() if self.output == "probability" else found
