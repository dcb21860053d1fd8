"""Batches: what the data module hands to a LightningModule, and how rows become one."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grade_lightning.data.cuts import Cut
from grade_lightning.data.encoding import encode as encode
from grade_lightning.data.encoding import encode_all, encode_completions, encode_texts
from grade_lightning.data.texts import prompt_of, text_of
from grade_lightning.errors import InputError
from grade_lightning.rewards.conversations import answered

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


class PreferenceBatch(TypedDict):
    """The chosen texts, whole and padded on the right (`[B, T]`), the rejected ones (`[B, R]`), and margins (`[B]`)."""

    input_ids: Tensor
    attention_mask: Tensor
    rejected_ids: Tensor
    rejected_mask: Tensor
    margins: Tensor


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
    cut: Cut = field(default_factory=Cut)

    def __call__(self, rows: Sequence[Row]) -> PromptBatch:
        """Tokenise and pad."""
        ids = self._encode(rows)
        columns = {name: [row[name] for row in rows] for name in rows[0] if name != "text"}
        if "prompt" not in columns:
            ids = self.cut("prompt from text", ids, self.max_tokens)
            columns["prompt"] = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        tokens, mask = _pad(ids, self.tokenizer, left=True)
        return {"input_ids": tokens, "attention_mask": mask, "columns": columns}

    def _encode(self, rows: Sequence[Row]) -> list[list[int]]:
        return encode_all(self.tokenizer, [prompt_of(row, self.max_chars) for row in rows])

    def lengths(self, rows: Sequence[Row]) -> dict[str, list[int]]:
        """Tokens of each row before anything is cut, by column."""
        return {"prompt" if "prompt" in rows[0] else "prompt from text": [len(ids) for ids in self._encode(rows)]}


@dataclass
class CollateTexts:
    """Make a `TextBatch` of whole texts, cut to `max_tokens`, with an end where it fits."""

    tokenizer: PreTrainedTokenizerBase
    max_tokens: int
    ends: Sequence[int] = ()
    cut: Cut = field(default_factory=Cut)

    def __call__(self, rows: Sequence[Row]) -> TextBatch:
        """Tokenise and pad."""
        tokens, mask = _pad(self.cut(self._name(rows), self._encode(rows), self.max_tokens), self.tokenizer)
        return {"input_ids": tokens, "attention_mask": mask}

    def _encode(self, rows: Sequence[Row]) -> list[list[int]]:
        if any(isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), str) for row in rows):
            prompts = [row["prompt"] for row in rows]
            ids = encode_all(self.tokenizer, prompts)
            answers = encode_completions(self.tokenizer, prompts, ids, [row["completion"] for row in rows], self.ends)
            return [prompt + answer for prompt, answer in zip(ids, answers, strict=True)]
        return encode_texts(self.tokenizer, [text_of(row) for row in rows], self.ends)

    def _name(self, rows: Sequence[Row]) -> str:
        return "text" if "text" in rows[0] else "prompt + completion"

    def lengths(self, rows: Sequence[Row]) -> dict[str, list[int]]:
        """Tokens of each row before anything is cut, by column."""
        return {self._name(rows): [len(ids) for ids in self._encode(rows)]}


@dataclass
class CollateLabelled:
    """Make a `LabelledBatch`: a `TextBatch` and the labels."""

    texts: CollateTexts

    def __call__(self, rows: Sequence[Row]) -> LabelledBatch:
        """Tokenise and pad."""
        labels = torch.tensor([row["label"] for row in rows], dtype=torch.int64)
        return {**self.texts(rows), "labels": labels}

    @property
    def cut(self) -> Cut:
        """Of the texts."""
        return self.texts.cut

    @property
    def max_tokens(self) -> int:
        """Of the texts."""
        return self.texts.max_tokens

    def lengths(self, rows: Sequence[Row]) -> dict[str, list[int]]:
        """Tokens of each row before anything is cut, by column."""
        return self.texts.lengths(rows)


@dataclass
class CollatePairs:
    """Make a `PairBatch`: each `prompt` as it stands, completions cut to `max_tokens`, with an end where it fits."""

    tokenizer: PreTrainedTokenizerBase
    max_tokens: int
    ends: Sequence[int] = ()
    cut: Cut = field(default_factory=Cut)

    def __call__(self, rows: Sequence[Row]) -> PairBatch:
        """Tokenise and pad."""
        prompts, completions = self._encode(rows)
        tokens, mask = _pad(prompts, self.tokenizer, left=True)
        chosen, chosen_mask = self._complete(rows, completions, "chosen")
        rejected, rejected_mask = self._complete(rows, completions, "rejected")
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

    def _encode(self, rows: Sequence[Row]) -> tuple[list[list[int]], dict[str, list[list[int]]]]:
        prompts = [row["prompt"] for row in rows]
        ids = encode_all(self.tokenizer, prompts)
        return ids, {
            name: encode_completions(self.tokenizer, prompts, ids, [row[name] for row in rows], self.ends)
            for name in ("chosen", "rejected")
        }

    def _complete(
        self, rows: Sequence[Row], completions: dict[str, list[list[int]]], column: str
    ) -> tuple[Tensor, Tensor]:
        for row, ids in zip(rows, completions[column], strict=True):
            if not ids:
                raise InputError(
                    f"column '{column}': the tokenizer makes no token of {row[column]!r} and has no eos_token; drop "
                    "the row or set the tokenizer's eos_token"
                )
        return _pad(self.cut(column, completions[column], self.max_tokens), self.tokenizer)

    def lengths(self, rows: Sequence[Row]) -> dict[str, list[int]]:
        """Tokens of each completion before anything is cut, by column."""
        return {name: [len(ids) for ids in found] for name, found in self._encode(rows)[1].items()}


@dataclass
class CollatePreferences:
    """Make a `PreferenceBatch`: prompt and completion as one text, cut to `max_tokens`, with an end where it fits.

    Conversations are written by the chat template, as a reward that reads messages would write them.
    """

    tokenizer: PreTrainedTokenizerBase
    max_tokens: int
    ends: Sequence[int] = ()
    cut: Cut = field(default_factory=Cut)

    def __call__(self, rows: Sequence[Row]) -> PreferenceBatch:
        """Tokenise and pad."""
        (chosen, chosen_mask), (rejected, rejected_mask) = (
            _pad(self.cut(_whole(name), self._encode(rows, name), self.max_tokens), self.tokenizer) for name in _SIDES
        )
        margins = torch.tensor([float(row.get("margin") or 0) for row in rows], dtype=torch.float32)
        return {
            "input_ids": chosen,
            "attention_mask": chosen_mask,
            "rejected_ids": rejected,
            "rejected_mask": rejected_mask,
            "margins": margins,
        }

    def _encode(self, rows: Sequence[Row], name: str) -> list[list[int]]:
        prompts, completions = [row["prompt"] for row in rows], [row[name] for row in rows]
        ids = encode_all(self.tokenizer, prompts)
        answers = encode_completions(self.tokenizer, prompts, ids, completions, self.ends)
        found = [prompt + answer for prompt, answer in zip(ids, answers, strict=True)]
        for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            if not isinstance(prompt, str):
                text = answered(self.tokenizer, prompt, completion)
                found[number] = self.tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return found

    def lengths(self, rows: Sequence[Row]) -> dict[str, list[int]]:
        """Tokens of each text before anything is cut, by column."""
        return {_whole(name): [len(ids) for ids in self._encode(rows, name)] for name in _SIDES}


_SIDES = "chosen", "rejected"


def _whole(name: str) -> str:
    return f"prompt + {name}"


@dataclass
class CollateHeldOutPairs(CollatePrompts):
    """Make a `PromptBatch` to draw completions for; a `PairBatch` where all rows have both completions."""

    pairs: CollatePairs | None = None

    def __call__(self, rows: Sequence[Row]) -> PromptBatch | PairBatch:
        """Tokenise and pad."""
        prompts = super().__call__(rows)
        if self.pairs is None or not all(isinstance(row.get(name), str) for row in rows for name in _SIDES):
            return prompts
        return {**self.pairs(rows), "columns": prompts["columns"]}


Collate = CollatePrompts | CollateTexts | CollateLabelled | CollatePairs | CollatePreferences
