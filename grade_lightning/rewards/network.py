"""Rewards that are networks with a tokenizer of their own, which may have the policy's vocabulary or another."""

from abc import abstractmethod
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from grade_lightning.errors import InputError
from grade_lightning.policies.anatomy import TOKENS, distance, some_tokens, tolerance
from grade_lightning.policies.context import context_length
from grade_lightning.policies.loading import embedding_table, load_pretrained, resolve_model, torch_dtype
from grade_lightning.records import RelaxedRollout, Rollout, Scores

from .differentiable import DifferentiableReward
from .retokenize import Pieces, retokenize


class NetworkReward(DifferentiableReward):
    """A reward that is a frozen network, read from a folder with its tokenizer.

    Differentiable if it shares the policy's vocabulary. Else the text is decoded and read in the reward's own tokens,
    which gives the exact score and, but through :class:`.TranslatedReward`, no gradient.

    Args:
        path: a folder or a name on the Hub.
        dtype: of the weights.
    """

    def __init__(self, path: str, dtype: str) -> None:
        super().__init__()
        self.path = path
        self.dtype = torch_dtype(dtype)
        self.vocabulary = 0
        self.foreign: PreTrainedTokenizerBase | None = None
        """The reward's tokenizer, where it has another vocabulary than the policy's."""

    @abstractmethod
    def read(self, path: str, tokenizer: PreTrainedTokenizerBase) -> None:
        """Read the network of a folder; its tokenizer is given."""

    @property
    @abstractmethod
    def network(self) -> PreTrainedModel | None:
        """What has the table of embeddings; None before it is read."""

    @property
    def name(self) -> str:
        """`classifier`."""
        return "classifier"

    def load(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
        """Read the network, and see whether it shares the policy's vocabulary.

        Raises:
            InputError: it cannot be read, or embeds fewer tokens than the policy has logits.
        """
        self.vocabulary = vocabulary
        if self.network is None:
            path = resolve_model(self.path, "reward")
            own = load_pretrained(AutoTokenizer, path)
            if own.get_vocab() != tokenizer.get_vocab():
                self.foreign, self.differentiable, self._policy = own, False, tokenizer
            self.read(path, own)
            self.requires_grad_(False).eval()
        rows = self._loaded.config.get_text_config().vocab_size
        if rows < vocabulary and self.foreign is None:
            raise InputError(f"reward {self.path}: embeds {rows} tokens but the policy has {vocabulary} logits")

    @property
    def _loaded(self) -> Any:
        if self.network is None:
            raise RuntimeError(f"{type(self).__name__}.load() was not called")
        return self.network

    @property
    def context_length(self) -> int | None:
        """The network's; its own tokens are not the policy's, and are counted when they are made."""
        return None if self.foreign is not None else self.room

    @property
    def room(self) -> int | None:
        """The longest text that the network reads, in its own tokens."""
        longest = context_length(self._loaded.config)
        for name, module in self._loaded.named_modules():  # RoBERTa's positions begin behind that of padding
            if longest and name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
                longest -= int(module.padding_idx) + 1
        return longest

    def forward(self, rollout: Rollout) -> Tensor:
        """Scores of the sampled tokens, or of the same text in the reward's own tokens."""
        if self.foreign is None:
            return super().forward(rollout)
        ids, mask = self.own_tokens(rollout, self.foreign)
        return self.score_embeddings(self.embed(ids), mask)

    def own_tokens(self, rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
        """Ids and mask of what the reward reads, (B, L), in its own tokens."""
        pieces = self.translate(rollout, tokenizer)
        return pieces.ids, pieces.mask

    def embed(self, ids: Tensor) -> Tensor:
        """Input embeddings of the reward's own tokens, (…) → (…, width)."""
        embeddings: Tensor = self._loaded.get_input_embeddings()(ids)
        return embeddings

    def translate(self, rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> Pieces:
        """The same text in the reward's own tokens."""
        return retokenize(rollout, tokenizer, self.room)

    @property
    def reads_prefixes(self) -> bool:  # type: ignore[override]
        """With the policy's vocabulary, if what the network says of a text's beginning depends on no later token."""
        return self.foreign is None and self.causal

    @cached_property
    def causal(self) -> bool:
        """Found by trying: whether a later token changes nothing that was said of earlier positions."""
        one, further = some_tokens(self._loaded, 2, TOKENS).split(1)
        other = torch.cat([one[:, :-1], further[:, -1:]], dim=1)
        mask = torch.ones_like(one)
        with torch.no_grad():
            found, changed = (self.along(self.embed(ids), mask) for ids in (one, other))
        if found is None or changed is None:
            return False
        found, changed = found[:, :-1], changed[:, :-1]
        return torch.equal(found, changed) or distance(changed, found) <= tolerance(found)

    def along(self, embeddings: Tensor, mask: Tensor) -> Tensor | None:
        """Scores of the text up to each position, (B, L), of a causal network; None: its head reads no beginnings."""
        return None

    def places(self, rollout: Rollout) -> Tensor:
        """Where in the text that is scored each token of the completion is, (B, T); −1: nowhere."""
        length = rollout.completion_ids.shape[1]
        found = rollout.prompt_ids.shape[1] + torch.arange(length, device=rollout.completion_ids.device)
        return found.expand(len(rollout.ids), length)

    @torch.no_grad()
    def with_prefixes(self, rollout: Rollout) -> Scores:
        """One pass: the score of the whole text and of what stands before each token.

        Raises:
            InputError: another vocabulary, or a network that sees later tokens.
        """
        if not self.reads_prefixes:
            return super().with_prefixes(rollout)
        embeddings, mask = self.place(rollout, self.table()[rollout.completion_ids])
        values = self.along(embeddings, mask)
        assert values is not None
        places = self.places(rollout)
        before = torch.where(places >= 0, places - 1, places.cummax(1).values)  # of a token that it does not read
        prefixes = values.gather(1, before.clamp(min=0)).masked_fill(before < 0, 0)
        last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1, keepdim=True)
        total = values.gather(1, last).squeeze(1)
        return Scores(total, {self.name: total}, prefixes=prefixes)

    def pathwise(self, rollout: Rollout) -> Scores:
        """Scores with the gradient at the tokens.

        Raises:
            InputError: another vocabulary: the policy's tokens are none that the network could be differentiated in.
        """
        if self.foreign is not None:
            raise InputError(
                f"reward {self.path}: its vocabulary ({len(self.foreign)} tokens) is not the policy's "
                f"({len(self._policy)}), and GRADE sends the reward's gradient through the tokens; wrap it "
                f"(--model.reward TranslatedReward --model.reward.reward {type(self).__name__} …), use a method that "
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

    def train(self, mode: bool = True) -> "NetworkReward":
        """The network is frozen and stays in evaluation mode."""
        return super().train(False)

    def table(self) -> Tensor:
        """Embedding table, (vocabulary of the policy, width); of another vocabulary that of the reward's own tokens."""
        return embedding_table(self._loaded, self.vocabulary if self.foreign is None and self.vocabulary else None)
