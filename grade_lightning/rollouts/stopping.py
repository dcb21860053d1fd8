"""Stop strings: a completion is over where it has said one."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grade_lightning.records import Rollout


def tokens_until(tokenizer: PreTrainedTokenizerBase, ids: list[int], stop: Sequence[str]) -> int | None:
    """How many tokens it takes until a stop string is complete; None where there is none.

    Args:
        tokenizer: of the tokens.
        ids: tokens of a completion.
        stop: the strings.

    Example:
        >>> from tokenizers import Tokenizer, decoders, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> inner = Tokenizer(models.WordLevel({"<": 0, "a>b": 1, "c": 2}, unk_token="c"))
        >>> inner.decoder = decoders.Fuse()
        >>> tokens_until(PreTrainedTokenizerFast(tokenizer_object=inner), [2, 0, 1, 2], ["<a>"])
        3
    """

    def said(count: int) -> bool:
        text = str(tokenizer.decode(ids[:count], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        return any(words in text for words in stop)

    return bisect_left(range(len(ids)), True, lo=1, key=said) if said(len(ids)) else None


def stopped(tokenizer: PreTrainedTokenizerBase, ids: Tensor, stop: Sequence[str]) -> Tensor:
    """Whether each completion has said a stop string, (B,).

    Args:
        tokenizer: of the tokens.
        ids: completions without padding, (B, T).
        stop: the strings.
    """
    texts = tokenizer.batch_decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return torch.tensor([any(words in text for words in stop) for text in texts], device=ids.device)


def cut(rollout: Rollout, stop: Sequence[str]) -> Rollout:
    """End completions with the token that completes a stop string; what that token says beyond the string stays.

    Args:
        rollout: as an engine drew it.
        stop: the strings; with none the rollout is as it was.
    """
    if not stop:
        return rollout
    lengths = rollout.lengths.tolist()
    for row, (ids, length) in enumerate(zip(rollout.completion_ids.tolist(), lengths, strict=True)):
        lengths[row] = tokens_until(rollout.tokenizer, ids[:length], stop) or length
    width = rollout.completion_ids.shape[1]
    device = rollout.completion_ids.device
    mask = torch.arange(width, device=device) < torch.tensor(lengths, device=device).unsqueeze(1)
    logps = rollout.engine_logps
    return replace(
        rollout,
        completion_ids=rollout.completion_ids.masked_fill(~mask, rollout.tokenizer.pad_token_id),
        completion_mask=mask,
        sampled=rollout.sampled & mask,
        engine_logps=None if logps is None else logps.masked_fill(~mask, 0),
        stop=list(stop),
    )
