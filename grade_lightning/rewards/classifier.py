"""The differentiable classifier of the paper: a language model's body, mean pooling, a two-layer head."""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from grade_lightning.distributed import gather_full_state, is_first_process
from grade_lightning.errors import InputError
from grade_lightning.functional.sequences import position_ids
from grade_lightning.policies.anatomy import examine_backbone
from grade_lightning.policies.context import context_length
from grade_lightning.policies.loading import (
    config_without_dropout,
    embedding_table,
    load_pretrained,
    resolve_model,
    torch_dtype,
)
from grade_lightning.policies.modes import evaluating
from grade_lightning.records import RelaxedRollout, Rollout, Scores

from .differentiable import DifferentiableReward
from .retokenize import retokenize

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
        states = self.backbone(
            inputs_embeds=embeddings, attention_mask=mask, position_ids=position_ids(mask), use_cache=False
        ).last_hidden_state
        states = states.to(next(self.head.parameters()).dtype)
        keep = mask.unsqueeze(-1).to(states.dtype)
        logits: Tensor = self.head((states * keep).sum(1) / keep.sum(1)).squeeze(-1)
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
                f"{path}: holds no {HEAD_CONFIG}, so it is no reward model of ours; "
                "train one with grade-fit --model RewardModel and name its folder"
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


class ClassifierReward(DifferentiableReward):
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
        super().__init__()
        self.dtype = torch_dtype(dtype)
        self.path = path
        self.output = output
        self.classifier: Classifier | None = None
        self.vocabulary = 0
        self.foreign: PreTrainedTokenizerBase | None = None
        """The classifier's tokenizer, where it has another vocabulary than the policy's."""

    @classmethod
    def from_classifier(
        cls, classifier: Classifier, output: Literal["probability", "logit"] = "probability"
    ) -> "ClassifierReward":
        """Use a classifier that is in memory already."""
        reward = cls(path="memory", output=output)
        reward.classifier = classifier.requires_grad_(False).eval()
        return reward

    @property
    def name(self) -> str:
        """`classifier`."""
        return "classifier"

    def load(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
        """Read the classifier, and see whether it shares the policy's vocabulary.

        Raises:
            InputError: it cannot be read, or embeds fewer tokens than the policy has logits.
        """
        self.vocabulary = vocabulary
        if self.classifier is None:
            path = resolve_model(self.path, "reward")
            own = load_pretrained(AutoTokenizer, path)
            if own.get_vocab() != tokenizer.get_vocab():
                self.foreign, self.differentiable, self._policy = own, False, tokenizer
            self.classifier = Classifier.from_pretrained(path, self.dtype).requires_grad_(False).eval()
        rows = self._network.backbone.config.get_text_config().vocab_size
        if rows < vocabulary and self.foreign is None:
            raise InputError(f"reward {self.path}: embeds {rows} tokens but the policy has {vocabulary} logits")

    @property
    def context_length(self) -> int | None:
        """The backbone's; its own tokens are not the policy's, and are counted when they are made."""
        return None if self.foreign is not None else context_length(self._network.backbone.config)

    def forward(self, rollout: Rollout) -> Tensor:
        """Scores of the sampled tokens, or of the same text in the classifier's own tokens."""
        if self.foreign is None:
            return super().forward(rollout)
        ids, mask = retokenize(rollout, self.foreign, context_length(self._network.backbone.config))
        return self.score_embeddings(self._network.embed(ids), mask)

    def pathwise(self, rollout: Rollout) -> Scores:
        """Scores with the gradient at the tokens.

        Raises:
            InputError: another vocabulary: the policy's tokens are none that the classifier could be differentiated in.
        """
        if self.foreign is not None:
            raise InputError(
                f"reward {self.path}: its vocabulary ({len(self.foreign)} tokens) is not the policy's "
                f"({len(self._policy)}), and GRADE sends the reward's gradient through the tokens; use a method that "
                "needs its score alone (RLOO, GRPO …), or train a reward model on the policy's own backbone: "
                f"grade-fit --model RewardModel --model.backbone {self._policy.name_or_path or 'POLICY'}"
            )
        return super().pathwise(rollout)

    def relaxed(self, rollout: RelaxedRollout) -> Scores:
        """Scores of the soft tokens, with their graph.

        Raises:
            InputError: another vocabulary.
        """
        if self.foreign is not None:
            self.pathwise(rollout)  # says what to do instead
        return super().relaxed(rollout)

    @property
    def _network(self) -> Classifier:
        if self.classifier is None:
            raise RuntimeError("ClassifierReward.load() was not called")
        return self.classifier

    def train(self, mode: bool = True) -> "ClassifierReward":
        """The classifier is frozen and stays in evaluation mode."""
        return super().train(False)

    def table(self) -> Tensor:
        """Embedding table of the classifier, (vocabulary, width)."""
        return embedding_table(self._network.backbone, self.vocabulary or None)

    def score_embeddings(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """P(positive) or the logit, (B,), in float32 or better."""
        logits: Tensor = self._network(embeddings, mask)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits.sigmoid() if self.output == "probability" else logits
