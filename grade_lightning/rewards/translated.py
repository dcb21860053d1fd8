"""A differentiable reward of another vocabulary: its score in its own tokens, its gradient at the policy's."""

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grade_lightning.errors import InputError
from grade_lightning.functional.spans import shares
from grade_lightning.records import Rollout

from .differentiable import DifferentiableReward
from .network import NetworkReward
from .spans import check_fast, rollout_spans
from .vocabularies import pieces_of_vocabulary, translated_table


class TranslatedReward(DifferentiableReward):
    r"""A reward of another tokenizer, for the methods that backpropagate through the reward.

    The score is exact: the text is decoded and read in the reward's own tokens, its pieces. The gradient is not that of
    the score, which has none at the policy's tokens. With E the reward's table and G_j its gradient at piece j, token t
    gets

        Σ_j s_tj G_j   at the table   Ē_v = mean of E over the pieces that token v is read as,

    s_tj the share of the piece's characters that comes from the token. Soft tokens move the pieces by
    Σ_t s_tj (soft − hard embedding). The end of a completion is the reward's EOS, if it has one. If the vocabularies
    are the same, nothing is translated.

    Args:
        reward: a network with a tokenizer of its own.

    Raises:
        InputError: the reward reads something else than the text, as a judge does.
    """

    def __init__(self, reward: NetworkReward) -> None:
        super().__init__()
        if type(reward).own_tokens is not NetworkReward.own_tokens:
            raise InputError(
                f"TranslatedReward: {type(reward).__name__} reads more than prompt and completion, and what of it "
                "is the completion's is not known; give a judge of the policy's vocabulary, or use a method that needs "
                "its score alone (RLOO, GRPO …)"
            )
        self.reward = reward
        self.words: Tensor | None
        self.register_buffer("words", None, persistent=False)

    @property
    def name(self) -> str:
        """That of the reward."""
        return self.reward.name

    @property
    def context_length(self) -> int | None:
        """That of the reward."""
        return self.reward.context_length

    def load(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
        """Read the reward, and embed each token of the policy as what the reward reads it as.

        Raises:
            InputError: it cannot be read, or a tokenizer does not say which characters a token is made of.
        """
        self.reward.load(tokenizer, vocabulary)
        foreign = self.reward.foreign
        if foreign is None or self.words is not None:
            return
        check_fast(tokenizer, "policy")
        check_fast(foreign, f"reward {self.reward.path}")
        pieces = pieces_of_vocabulary(tokenizer, vocabulary, foreign)
        if tokenizer.eos_token_id is not None and foreign.eos_token_id is not None:
            pieces[tokenizer.eos_token_id] = [foreign.eos_token_id]
        self.words = translated_table(pieces, self.reward.table())

    def table(self) -> Tensor:
        """Embedding table, (vocabulary of the policy, width)."""
        return self.reward.table() if self.words is None else self.words

    def score_embeddings(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """The reward's, of embeddings of its own tokens."""
        return self.reward.score_embeddings(embeddings, mask)

    def forward(self, rollout: Rollout) -> Tensor:
        """The reward's own score."""
        scores: Tensor = self.reward(rollout)
        return scores

    def place(self, rollout: Rollout, completion: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings of the pieces, moved as far as the completion's are from those of its hard tokens."""
        foreign = self.reward.foreign
        if foreign is None:
            return self.reward.place(rollout, completion)
        pieces = self.reward.translate(rollout, foreign)
        tokens = rollout_spans(rollout, pieces)
        share = shares(tokens, pieces.spans)[:, -completion.shape[1] :].to(completion)
        moved = share.mT @ (completion - self.table()[rollout.completion_ids])
        return self.reward.embed(pieces.ids) + moved, pieces.mask

    def train(self, mode: bool = True) -> "TranslatedReward":
        """The network is frozen and stays in evaluation mode."""
        return super().train(False)
