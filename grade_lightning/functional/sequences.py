"""Masks, positions and log-probabilities of token sequences."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def completion_mask(tokens: Int[Tensor, "b t"], eos_ids: Sequence[int]) -> Bool[Tensor, "b t"]:
    """True up to and including the first end-of-sequence token; works when padding is that token, too.

    Example:
        >>> completion_mask(torch.tensor([[5, 0, 0, 0], [5, 6, 7, 8]]), eos_ids=[0]).int()
        tensor([[1, 1, 0, 0],
                [1, 1, 1, 1]], dtype=torch.int32)
    """
    ended = torch.isin(tokens, torch.as_tensor(list(eos_ids), dtype=tokens.dtype, device=tokens.device))
    return (ended.cumsum(-1) - ended.long()) == 0


def last_token(mask: Bool[Tensor, "b t"]) -> Bool[Tensor, "b t"]:
    """True at the last token of each row's mask alone; the mask may have gaps.

    Example:
        >>> last_token(torch.tensor([[True, True, False, False], [True, False, False, True]])).int()
        tensor([[0, 1, 0, 0],
                [0, 0, 0, 1]], dtype=torch.int32)
    """
    remaining = mask.flip(-1).cumsum(-1).flip(-1)
    return mask & (remaining == 1)


def position_ids(attention_mask: Int[Tensor, "b l"]) -> Int[Tensor, "b l"]:
    """Positions that count real tokens only, so that left padding does not shift them.

    Example:
        >>> position_ids(torch.tensor([[0, 0, 1, 1]]))
        tensor([[0, 0, 0, 1]])
    """
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def truncate_logits(
    logits: Float[Tensor, "*batch v"], top_k: int | None = None, top_p: float = 1.0
) -> Float[Tensor, "*batch v"]:
    """Set logits outside the `top_k` most likely tokens, or outside the nucleus of mass `top_p`, to −inf.

    Top-k first, then top-p of what remains, as in transformers. The most likely token always stays.

    References:
        | The Curious Case of Neural Text Degeneration (Holtzman et al., 2020), https://arxiv.org/abs/1904.09751

    Example:
        >>> truncate_logits(torch.tensor([3.0, 2.0, 1.0]), top_k=2)
        tensor([3., 2., -inf])
        >>> truncate_logits(torch.tensor([0.6, 0.3, 0.1]).log(), top_p=0.8).exp()
        tensor([0.6000, 0.3000, 0.0000])
    """
    if top_k is not None and top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        probs = ordered.softmax(-1)
        outside = probs.cumsum(-1) - probs >= top_p
        logits = logits.masked_fill(outside.scatter(-1, order, outside), -torch.inf)
    return logits


def token_logps(logps: Float[Tensor, "*batch v"], tokens: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """Pick each token's log-probability.

    Example:
        >>> token_logps(torch.tensor([[0.25, 0.75]]).log(), torch.tensor([1])).exp()
        tensor([0.7500])
    """
    return logps.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def entropy(logps: Float[Tensor, "*batch v"]) -> Float[Tensor, "*batch"]:
    """Entropy in nats; tokens of probability zero (−inf) add nothing.

    Example:
        >>> entropy(torch.tensor([0.5, 0.5, 0.0]).log())
        tensor(0.6931)
    """
    return -(logps.exp() * logps.clamp(min=torch.finfo(logps.dtype).min)).sum(-1)


def masked_sum(values: Float[Tensor, "b t"], mask: Bool[Tensor, "b t"]) -> Float[Tensor, " b"]:
    """Sum over the masked positions of each sequence; values elsewhere may be anything, NaN included.

    Example:
        >>> masked_sum(torch.tensor([[1.0, 2.0, torch.nan]]), torch.tensor([[True, True, False]]))
        tensor([3.])
    """
    return values.masked_fill(~mask, 0).sum(-1)


def distinct_bigrams(tokens: Int[Tensor, "b t"], mask: Bool[Tensor, "b t"]) -> float:
    """Distinct-2: different bigrams over all bigrams of a set of completions; NaN without any bigram.

    References:
        | A Diversity-Promoting Objective Function for Neural Conversation Models (Li et al., 2016),
          https://arxiv.org/abs/1510.03055

    Example:
        >>> distinct_bigrams(torch.tensor([[1, 2, 1, 2]]), torch.ones(1, 4, dtype=torch.bool))  # 12, 21, 12
        0.6666666666666666
    """
    bigrams = torch.stack([tokens[:, :-1], tokens[:, 1:]], dim=-1)[mask[:, 1:] & mask[:, :-1]]
    return len(bigrams.unique(dim=0)) / len(bigrams) if len(bigrams) else float("nan")
