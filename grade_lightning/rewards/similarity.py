"""How near a text's meaning is to that of a target: the cosine of their embeddings."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from grade_lightning.errors import InputError, check_range
from grade_lightning.numerics import widened
from grade_lightning.policies.loading import config_without_dropout, load_pretrained

from .network import NetworkReward


class SimilarityReward(NetworkReward):
    """Cosine of the text's embedding to that of a target text, by an encoder such as those of sentence-transformers.

    Differentiable if it shares the policy's vocabulary; else through :class:`.TranslatedReward`.

    Args:
        path: a folder, or a name on the Hub.
        target: the text.
        pooling: of the last hidden states: their `mean`, or the `first` one. The model's card says which.
        scale: what the cosine is multiplied by.
        dtype: of the weights.

    References:
        | Sentence-BERT: Sentence Embeddings using Siamese BERT-Networks (Reimers and Gurevych, 2019),
          https://arxiv.org/abs/1908.10084
    """

    def __init__(
        self,
        path: str,
        target: str,
        pooling: Literal["mean", "first"] = "mean",
        scale: float = 1.0,
        dtype: str = "float32",
    ) -> None:
        super().__init__(path, dtype)
        check_range("(-inf, inf)", "SimilarityReward", scale=scale)
        if not target.strip():
            raise InputError("SimilarityReward: the target is empty; give the text that completions are to be near to")
        self.target = target
        self.pooling = pooling
        self.scale = scale
        self.encoder: PreTrainedModel | None = None

    @property
    def name(self) -> str:
        """`similarity`."""
        return "similarity"

    def read(self, path: str, tokenizer: PreTrainedTokenizerBase) -> None:
        """Read the encoder, and embed the target."""
        model = load_pretrained(
            AutoModel, path, config=config_without_dropout(path), dtype=self.dtype, use_safetensors=True
        )
        self.encoder = model.eval()
        ids = torch.tensor([tokenizer.encode(self.target)])
        if self.room is not None and ids.shape[1] > self.room:
            raise InputError(
                f"reward {self.path}: the target has {ids.shape[1]} tokens, and {self.room} are read; shorten it"
            )
        with torch.no_grad():
            goal = self._pool(model.get_input_embeddings()(ids), torch.ones_like(ids))
        self.goal: Tensor
        self.register_buffer("goal", goal, persistent=False)

    @property
    def network(self) -> PreTrainedModel | None:
        """The encoder."""
        return self.encoder

    def score_embeddings(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """The cosine, (B,), in float32 or better."""
        return self.scale * cosine_similarity(self._pool(embeddings, mask), self.goal, dim=-1)

    def _pool(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        states = widened(self._loaded(inputs_embeds=embeddings, attention_mask=mask).last_hidden_state)
        if self.pooling == "first":
            return states[:, 0]
        keep = mask.unsqueeze(-1).to(states.dtype)
        return (states * keep).sum(1) / keep.sum(1)
