"""Batches: what the data module hands to a LightningModule, and how rows become one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grade_lightning.data.texts import Prompt, prompt_of, text_of
from grade_lightning.errors import InputError

Row = dict[str, Any]


class PromptBatch(TypedDict):
    """Prompts, padded on the left (`[B, P]`), and the rows' columns for rewards, "prompt" among them."""

    input_ids: Tensor
    attention_mask: Tensor
    columns: dict[str, list[Any]]


class LabelledBatch(TypedDict):
    """Texts, padded on the right (`[B, T]`), and their labels (`[B]`)."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


class TextBatch(TypedDict):
    """Texts, padded on the right (`[B, T]`)."""

    input_ids: Tensor
    attention_mask: Tensor


class PairBatch(TypedDict):
    """Prompts, padded on the left (`[B, P]`), and two completions of each, padded on the right (`[B, C]`, `[B, R]`).

    `columns` has the rows' other columns, "prompt" among them.
    """

    input_ids: Tensor
    attention_mask: Tensor
    chosen_ids: Tensor
    chosen_mask: Tensor
    rejected_ids: Tensor
    rejected_mask: Tensor
    columns: dict[str, list[Any]]


def encode(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Tokenise all of a text, after one BOS if the tokenizer has it, or a conversation by chat template."""
    ids: list[int]
    if isinstance(prompt, str):
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        ids = bos + tokenizer.encode(prompt, add_special_tokens=False, verbose=False)
    elif tokenizer.chat_template:
        templated = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        ids = cast(list[int], templated)  # a list of lists only for a list of conversations
    else:
        raise InputError(
            "column 'prompt' holds messages, but the tokenizer has no chat template; "
            "write the prompts as text, or use a chat model"
        )
    if not ids:
        raise InputError(f"the tokenizer makes no token of {prompt!r}; drop the row or use another tokenizer")
    return ids


def encode_completion(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, prompt_ids: list[int], completion: str
) -> list[int]:
    """Tokenise what follows a prompt, without EOS: the prompt's tokens and these are those of both texts together.

    Where a token would reach over the end of the prompt, the completion is tokenised alone instead, since sampled
    completions follow the prompt's own tokens.
    """
    # alone, tokenizers after SentencePiece's fashion would put a space in front
    both = encode(tokenizer, prompt + completion) if isinstance(prompt, str) else []
    if both[: len(prompt_ids)] == prompt_ids:
        return both[len(prompt_ids) :]
    ids: list[int] = tokenizer.encode(completion, add_special_tokens=False, verbose=False)
    return ids


def _pad(ids: Sequence[list[int]], tokenizer: PreTrainedTokenizerBase, left: bool = False) -> tuple[Tensor, Tensor]:
    """Token ids and mask; the mask comes from the lengths, since the padding token may also be the EOS."""
    filler = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if filler is None:
        raise InputError("the tokenizer has neither a pad_token nor an eos_token to pad with; set its pad_token")
    tokens = torch.full((len(ids), max(map(len, ids))), filler, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for i, row in enumerate(ids):
        here = slice(-len(row), None) if left else slice(len(row))
        tokens[i, here] = torch.tensor(row)
        mask[i, here] = 1
    return tokens, mask


@dataclass
class CollatePrompts:
    """Make a `PromptBatch`: of each row its `prompt` as it stands, else its `text`'s opening, cut to fit."""

    tokenizer: PreTrainedTokenizerBase
    max_chars: int
    max_tokens: int

    def __call__(self, rows: Sequence[Row]) -> PromptBatch:
        """Tokenise and pad."""
        ids = [encode(self.tokenizer, prompt_of(row, self.max_chars)) for row in rows]
        columns = {name: [row[name] for row in rows] for name in rows[0] if name != "text"}
        if "prompt" not in columns:
            ids = [row[: self.max_tokens] for row in ids]
            columns["prompt"] = [self.tokenizer.decode(row, skip_special_tokens=True) for row in ids]
        tokens, mask = _pad(ids, self.tokenizer, left=True)
        return {"input_ids": tokens, "attention_mask": mask, "columns": columns}


@dataclass
class CollateTexts:
    """Make a `TextBatch` of whole texts, cut to `max_tokens`, with EOS where it fits."""

    tokenizer: PreTrainedTokenizerBase
    max_tokens: int

    def __call__(self, rows: Sequence[Row]) -> TextBatch:
        """Tokenise and pad."""
        eos = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        ids = [(encode(self.tokenizer, text_of(row)) + eos)[: self.max_tokens] for row in rows]
        tokens, mask = _pad(ids, self.tokenizer)
        return {"input_ids": tokens, "attention_mask": mask}


@dataclass
class CollateLabelled:
    """Make a `LabelledBatch`: a `TextBatch` and the labels."""

    texts: CollateTexts

    def __call__(self, rows: Sequence[Row]) -> LabelledBatch:
        """Tokenise and pad."""
        labels = torch.tensor([row["label"] for row in rows], dtype=torch.int64)
        return {**self.texts(rows), "labels": labels}


@dataclass
class CollatePairs:
    """Make a `PairBatch`: each `prompt` as it stands, completions cut to `max_tokens`, with EOS where it fits."""

    tokenizer: PreTrainedTokenizerBase
    max_tokens: int

    def __call__(self, rows: Sequence[Row]) -> PairBatch:
        """Tokenise and pad."""
        ids = [encode(self.tokenizer, row["prompt"]) for row in rows]
        tokens, mask = _pad(ids, self.tokenizer, left=True)
        chosen, chosen_mask = self._complete(rows, ids, "chosen")
        rejected, rejected_mask = self._complete(rows, ids, "rejected")
        names = [name for name in rows[0] if name not in ("text", "chosen", "rejected")]
        return {
            "input_ids": tokens,
            "attention_mask": mask,
            "chosen_ids": chosen,
            "chosen_mask": chosen_mask,
            "rejected_ids": rejected,
            "rejected_mask": rejected_mask,
            "columns": {name: [row[name] for row in rows] for name in names},
        }

    def _complete(self, rows: Sequence[Row], prompts: Sequence[list[int]], column: str) -> tuple[Tensor, Tensor]:
        eos = self.tokenizer.eos_token_id
        completions = []
        for row, prompt in zip(rows, prompts, strict=True):
            ids = encode_completion(self.tokenizer, row["prompt"], prompt, row[column])
            if eos is not None and ids[-1:] != [eos]:  # the text may end with it
                ids.append(eos)
            if not ids:
                raise InputError(
                    f"column '{column}': the tokenizer makes no token of {row[column]!r} and has no eos_token; drop "
                    "the row or set the tokenizer's eos_token"
                )
            completions.append(ids[: self.max_tokens])
        return _pad(completions, self.tokenizer)
