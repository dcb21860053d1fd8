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
