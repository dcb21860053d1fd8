"""Completions in the tokens of another tokenizer: for rewards that do not share the policy's vocabulary."""

from collections.abc import Sequence

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grade_lightning.records import Rollout

from .conversations import answered, conversations


def texts_of(rollout: Rollout) -> list[str]:
    """Prompt and completion of each row as one text, without special tokens."""
    rows = [ids[keep.bool()] for ids, keep in zip(rollout.ids.cpu(), rollout.mask.cpu(), strict=True)]
    return rollout.tokenizer.batch_decode(
        rows, skip_special_tokens=True
    )  # whole: parts may lose the space between them


def retokenize(
    rollout: Rollout, tokenizer: PreTrainedTokenizerBase, room: int | None = None, chat: bool = False
) -> tuple[Tensor, Tensor]:
    """Prompt and completion in the tokens of another tokenizer, with what it puts around a text.

    The EOS is there where the completion ended by itself, and only there.

    Args:
        rollout: in the policy's tokens.
        tokenizer: the other one.
        room: the most tokens; what is longer is cut at its end, with a warning. None: as many as it likes.
        chat: whether conversations are written by the other tokenizer's chat template, if it has one. Of those the
            template says how they end.

    Returns:
        Token ids and mask, (B, L), padded on the right.
    """
    eos = tokenizer.eos_token_id
    rows: list[list[int]] = []
    talks = conversations(rollout) if chat and tokenizer.chat_template else [None] * len(rollout.ids)
    plain = zip(texts_of(rollout), rollout.completions, rollout.has_eos.tolist(), talks, strict=True)
    for text, completion, ended, talk in plain:
        if talk is not None:
            written = answered(tokenizer, talk, completion)
            rows.append(tokenizer.encode(written, add_special_tokens=False, verbose=False))
            continue
        ids: list[int] = tokenizer.encode(text, verbose=False)
        if eos is not None:
            ids = ids[:-1] if ids[-1:] == [eos] else ids
            ids = [*ids, eos] if ended or not ids else ids
        rows.append(ids)
    return pack(rows, room, rollout.ids.device)


def pack(rows: Sequence[list[int]], room: int | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of tokens as ids and mask, (B, L), padded on the right; what is longer than `room` is cut, with a warning.

    Example:
        >>> pack([[4, 5], [6]], None, torch.device("cpu"))
        (tensor([[4, 5],
                [6, 0]]), tensor([[1, 1],
                [1, 0]]))
    """
    if room is not None and (cut := sum(len(ids) > room for ids in rows)):
        rank_zero_warn(
            f"reward: {cut} of {len(rows)} texts are longer than its context of {room} tokens in its own tokens, and "
            "are cut at the end; lower --model.sampler.max_new_tokens or --data.max_prompt_tokens"
        )
        rows = [ids[:room] for ids in rows]
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)], mask[row, : len(ids)] = torch.tensor(ids), 1
    return tokens.to(device), mask.to(device)
