"""Completions in their own tokens, with what a reward wants around them: its chat template, or what ends a text."""

import json
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grade_lightning.records import Rollout

from .conversations import around, conversations
from .retokenize import pack

_WORD = "Hello"


class Framed(NamedTuple):
    """Texts with a completion in each."""

    ids: Tensor
    """(B, L), padded on the right."""
    mask: Tensor
    """(B, L), 0 for padding."""
    places: Tensor
    """(B, T): where in `ids` each token of the completion is; −1: nowhere."""

    def place(self, table: Tensor, completion: Tensor) -> Tensor:
        """Embeddings of the texts, (B, L, width), with those of the completion, (B, T, width), in their places."""
        here = self.places >= 0
        rows = torch.arange(len(self.ids), device=here.device).unsqueeze(1).expand_as(here)
        where = rows[here], self.places[here]
        embeddings: Tensor = table[self.ids].index_put(where, completion[here].to(table.dtype))
        return embeddings


def frame(rollout: Rollout, tokenizer: PreTrainedTokenizerBase, room: int | None = None) -> Framed:
    """Prompts and completions as a reward of the same vocabulary reads them.

    A text keeps its tokens; what the tokenizer puts after a text, as BERT's `[SEP]`, is appended, but for an EOS, which
    is there only where the completion ended by itself. A conversation is written by the tokenizer's chat template, if
    it has one, around the completion's own tokens; the end of the turn is the template's.

    Args:
        rollout: in tokens of the same vocabulary.
        tokenizer: the reward's.
        room: the most tokens; what is longer is cut at its end, with a warning.
    """
    after = _after(tokenizer)
    talks = conversations(rollout) if tokenizer.chat_template else [None] * len(rollout.ids)
    known: dict[str, tuple[list[int], list[int]]] = {}
    prompts, completions = (
        [ids[keep.bool()].tolist() for ids, keep in zip(x.cpu(), mask.cpu(), strict=True)]
        for x, mask in (
            (rollout.prompt_ids, rollout.prompt_mask),
            (rollout.completion_ids, rollout.completion_mask),
        )
    )
    rows: list[list[int]] = []
    places = torch.full(rollout.completion_ids.shape, -1)
    for row, (prompt, words, ended, talk) in enumerate(
        zip(prompts, completions, rollout.has_eos.tolist(), talks, strict=True)
    ):
        front, back, last = prompt, [] if words[-1:] == after[:1] else after, None
        if talk is not None:
            key = json.dumps(talk, sort_keys=True, default=str)
            if key not in known:
                begin, end = around(tokenizer, talk)
                known[key] = tokens(tokenizer, begin), following(tokenizer, end)
            front, back = known[key]
            if ended:
                *words, stop = words
                last = back.index(stop) if stop in back else None  # the template writes the same token
        rows.append([*front, *words, *back])
        places[row, : len(words)] = len(front) + torch.arange(len(words))
        if last is not None:
            places[row, len(words)] = len(front) + len(words) + last
    ids, mask = pack(rows, room, rollout.ids.device)
    return Framed(ids, mask, places.masked_fill(places >= ids.shape[1], -1).to(ids.device))


def before(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts in front of a text."""
    plain = tokens(tokenizer, _WORD)
    whole: list[int] = tokenizer(_WORD)["input_ids"]
    at = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    return whole[:at]


def _after(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts after a text, without an EOS."""
    plain = tokens(tokenizer, _WORD)
    whole: list[int] = tokenizer(_WORD)["input_ids"]
    at = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    return [i for i in whole[at + len(plain) :] if i != tokenizer.eos_token_id]


def tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a text, and no special ones but those that are in it."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    return ids


def following(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of what follows other words: tokenizers in SentencePiece's fashion put a space in front of a text."""
    word, both = tokens(tokenizer, _WORD), tokens(tokenizer, _WORD + text)
    return both[len(word) :] if both[: len(word)] == word else tokens(tokenizer, text)
