"""Completions in the tokens of another tokenizer: for rewards that do not share the policy's vocabulary."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grade_lightning.records import Rollout

from .conversations import answered, conversations, spoken, with_answer


class Pieces(NamedTuple):
    """Texts in the tokens of another tokenizer: pieces, B rows of at most L."""

    ids: Tensor
    """(B, L), padded on the right."""
    mask: Tensor
    """(B, L), 0 for padding."""
    spans: Tensor
    """(B, L, 2), on the CPU: where in its text each piece begins and ends. Special tokens have no length, but for the
    EOS of a completion that ended by itself, which is one character behind the text. Of a slow tokenizer none has
    any."""
    texts: list[str]
    """As they were read: prompt and completion as they are, or a conversation."""
    plain: list[bool]
    """Whether it is the former."""
    templated: list[bool]
    """Whether the reward's own chat template wrote it."""


def texts_of(rollout: Rollout) -> list[str]:
    """Prompt and completion of each row as one text, without special tokens."""
    rows = [ids[keep.bool()] for ids, keep in zip(rollout.ids.cpu(), rollout.mask.cpu(), strict=True)]
    return rollout.tokenizer.batch_decode(
        rows, skip_special_tokens=True
    )  # whole: parts may lose the space between them


def retokenize(
    rollout: Rollout, tokenizer: PreTrainedTokenizerBase, room: int | None = None, chat: bool = False
) -> Pieces:
    """Prompt and completion in the tokens of another tokenizer, with what it puts around a text.

    The EOS is there where the completion ended by itself, and only there. Of a conversation the contents of its
    messages are read, but for the system's: what the policy's chat template puts between them is not for the reward.

    Args:
        rollout: in the policy's tokens.
        tokenizer: the other one.
        room: the most tokens; what is longer is cut at its end, with a warning. None: as many as it likes.
        chat: whether conversations are written by the other tokenizer's chat template instead, if it has one. Of those
            the template says how they end.
    """
    eos, fast = tokenizer.eos_token_id, tokenizer.is_fast
    rows: list[list[int]] = []
    places: list[list[tuple[int, int]]] = []
    texts: list[str] = []
    talks = conversations(rollout)
    templated = [chat and bool(tokenizer.chat_template) and talk is not None for talk in talks]
    read_by = zip(texts_of(rollout), rollout.completions, rollout.has_eos.tolist(), talks, templated, strict=True)
    for text, completion, ended, talk, by_template in read_by:
        if by_template:
            assert talk is not None
            text = answered(tokenizer, talk, completion)
        elif talk is not None:
            text = spoken(with_answer(talk, completion))
        texts.append(text)
        read = tokenizer(texts[-1], add_special_tokens=not by_template, return_offsets_mapping=fast, verbose=False)
        ids: list[int] = read["input_ids"]
        spans: list[tuple[int, int]] = read["offset_mapping"] if fast else [(0, 0)] * len(ids)
        if not by_template and eos is not None:
            if ids[-1:] == [eos]:
                ids, spans = ids[:-1], spans[:-1]
            if ended or not ids:
                ids, spans = [*ids, eos], [*spans, (len(text), len(text) + fast)]
        rows.append(ids)
        places.append(spans)
    tokens, mask = pack(rows, room, rollout.ids.device)
    where = torch.zeros(*tokens.shape, 2, dtype=torch.int64)
    for row, spans in enumerate(places):
        kept = spans[: tokens.shape[1]]
        where[row, : len(kept)] = torch.tensor(kept)
    return Pieces(tokens, mask, where, texts, [talk is None for talk in talks], templated)


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
