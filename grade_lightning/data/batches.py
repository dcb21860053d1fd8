"""Batches: what the data module hands to a LightningModule, and how rows become one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grade_lightning.data.cuts import Cut
from grade_lightning.data.text_batches import CollateLabelled as CollateLabelled
from grade_lightning.data.text_batches import CollateTexts as CollateTexts
from grade_lightning.data.text_batches import LabelledBatch as LabelledBatch
from grade_lightning.data.text_batches import TextBatch as TextBatch
from grade_lightning.data.texts import prompt_of
from grade_lightning.errors import InputError
from grade_lightning.policies.chat import chat_of, plain
from grade_lightning.policies.encoding import Prompt, encode_all, encode_completions
from grade_lightning.policies.encoding import encode as encode
from grade_lightning.policies.padding import pad
from grade_lightning.rewards.conversations import answered

Row = dict[str, Any]


def _column(row: Row, name: str) -> Any:
    """A value as rewards get it: messages without what Arrow adds, everything else as it is."""
    return plain(row[name]) if name in ("prompt", "completion", "chosen", "rejected", "tools") else row[name]


class PromptBatch(TypedDict):
    """Prompts, padded on the left (`[B, P]`), and the rows' columns for rewards, "prompt" among them."""

    input_ids: Tensor
    attention_mask: Tensor
    columns: dict[str, list[Any]]


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


class UnpairedBatch(TypedDict):
    """Prompts, padded on the left (`[B, P]`), a completion of each (`[B, C]`), and whether it is desirable (`[B]`).

    `columns` has the rows' other columns, "prompt" among them.
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion_ids: Tensor
    completion_mask: Tensor
    desirable: Tensor
    columns: dict[str, list[Any]]


class PreferenceBatch(TypedDict):
    """The chosen texts, whole and padded on the right (`[B, T]`), the rejected ones (`[B, R]`), and margins (`[B]`)."""

    input_ids: Tensor
    attention_mask: Tensor
    rejected_ids: Tensor
    rejected_mask: Tensor
    margins: Tensor


@dataclass
class CollatePrompts:
    """Make a `PromptBatch`: of each row its `prompt` as it stands, else its `text`'s opening, cut to fit."""

    tokenizer: PreTrainedTokenizerBase
    max_chars: int
    max_tokens: int
    variables: Mapping[str, Any] = field(default_factory=dict)
    cut: Cut = field(default_factory=Cut)

    def __call__(self, rows: Sequence[Row]) -> PromptBatch:
        """Tokenise and pad."""
        ids = self._encode(rows)
        columns = {name: [_column(row, name) for row in rows] for name in rows[0] if name not in ("text", "messages")}
        if "prompt" not in columns:
            ids = self.cut("prompt from text", ids, self.max_tokens)
            columns["prompt"] = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        tokens, mask = pad(ids, self.tokenizer, left=True)
        return {"input_ids": tokens, "attention_mask": mask, "columns": columns}

    def _encode(self, rows: Sequence[Row]) -> list[list[int]]:
        prompts = [chat_of(prompt_of(row, self.max_chars), row, self.variables) for row in rows]
        return encode_all(self.tokenizer, prompts)

    def lengths(self, rows: Sequence[Row]) -> dict[str, list[int]]:
        """Tokens of each row before anything is cut, by column."""
        return {"prompt" if "prompt" in rows[0] else "prompt from text": [len(ids) for ids in self._encode(rows)]}


@dataclass
class CollateCompletions:
    """Prompts as they stand, and completions of each, cut to `max_tokens`, with an end where it fits."""

    tokenizer: PreTrainedTokenizerBase
    max_tokens: int
    ends: Sequence[int] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)
    cut: Cut = field(default_factory=Cut)
    names: ClassVar[tuple[str, ...]]
    """The columns of the completions."""

    def _padded(self, rows: Sequence[Row]) -> tuple[list[Tensor], dict[str, list[Any]]]:
        """Ids and mask of the prompts, then of the completions of each name; the rows' other columns."""
        prompts, completions = self._encode(rows)
        tensors = [*pad(prompts, self.tokenizer, left=True)]
        for name in self.names:
            tensors += self._complete(rows, completions, name)
        others = [name for name in rows[0] if name not in ("text", "messages", *self.names)]
        return tensors, {name: [_column(row, name) for row in rows] for name in others}

    def _encode(self, rows: Sequence[Row]) -> tuple[list[list[int]], dict[str, list[list[int]]]]:
        prompts = _prompts(rows, self.variables)
        ids = encode_all(self.tokenizer, prompts)
        return ids, {
            name: encode_completions(self.tokenizer, prompts, ids, [row[name] for row in rows], self.ends)
            for name in self.names
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
        return pad(self.cut(column, completions[column], self.max_tokens), self.tokenizer)

    def lengths(self, rows: Sequence[Row]) -> dict[str, list[int]]:
        """Tokens of each completion before anything is cut, by column."""
        return {name: [len(ids) for ids in found] for name, found in self._encode(rows)[1].items()}


@dataclass
class CollatePairs(CollateCompletions):
    """Make a `PairBatch`."""

    names = "chosen", "rejected"

    def __call__(self, rows: Sequence[Row]) -> PairBatch:
        """Tokenise and pad."""
        (tokens, mask, chosen, chosen_mask, rejected, rejected_mask), columns = self._padded(rows)
        return {
            "input_ids": tokens,
            "attention_mask": mask,
            "chosen_ids": chosen,
            "chosen_mask": chosen_mask,
            "rejected_ids": rejected,
            "rejected_mask": rejected_mask,
            "columns": columns,
        }


@dataclass
class CollateUnpaired(CollateCompletions):
    """Make an `UnpairedBatch`."""

    names = ("completion",)

    def __call__(self, rows: Sequence[Row]) -> UnpairedBatch:
        """Tokenise and pad."""
        (tokens, mask, completions, completion_mask), columns = self._padded(rows)
        return {
            "input_ids": tokens,
            "attention_mask": mask,
            "completion_ids": completions,
            "completion_mask": completion_mask,
            "desirable": torch.tensor([bool(row["label"]) for row in rows]),
            "columns": columns,
        }


@dataclass
class CollatePreferences:
    """Make a `PreferenceBatch`: prompt and completion as one text, cut to `max_tokens`, with an end where it fits.

    Conversations are written by the chat template, as a reward that reads messages would write them.
    """

    tokenizer: PreTrainedTokenizerBase
    max_tokens: int
    ends: Sequence[int] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)
    cut: Cut = field(default_factory=Cut)

    def __call__(self, rows: Sequence[Row]) -> PreferenceBatch:
        """Tokenise and pad."""
        (chosen, chosen_mask), (rejected, rejected_mask) = (
            pad(self.cut(_whole(name), self._encode(rows, name), self.max_tokens), self.tokenizer) for name in _SIDES
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
        prompts, completions = _prompts(rows, self.variables), [row[name] for row in rows]
        ids = encode_all(self.tokenizer, prompts)
        answers = encode_completions(self.tokenizer, prompts, ids, completions, self.ends)
        found = [prompt + answer for prompt, answer in zip(ids, answers, strict=True)]
        for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            if not isinstance(prompt, str):
                text = answered(self.tokenizer, plain(rows[number]["prompt"]), completion)
                found[number] = self.tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return found

    def lengths(self, rows: Sequence[Row]) -> dict[str, list[int]]:
        """Tokens of each text before anything is cut, by column."""
        return {_whole(name): [len(ids) for ids in self._encode(rows, name)] for name in _SIDES}


def _prompts(rows: Sequence[Row], variables: Mapping[str, Any]) -> list[Prompt]:
    return [chat_of(row["prompt"], row, variables) for row in rows]


_SIDES = "chosen", "rejected"


def _whole(name: str) -> str:
    return f"prompt + {name}"


@dataclass
class CollateHeldOut(CollatePrompts):
    """Make a `PromptBatch` to draw completions for; where all rows have completions, too, a batch of these."""

    completions: CollatePairs | CollateUnpaired | None = None

    def __call__(self, rows: Sequence[Row]) -> PromptBatch | PairBatch | UnpairedBatch:
        """Tokenise and pad."""
        prompts, given = super().__call__(rows), self.completions
        if given is None or not all(isinstance(row.get(name), str) for row in rows for name in given.names):
            return prompts
        if isinstance(given, CollateUnpaired):
            return {**given(rows), "columns": prompts["columns"]} if "label" in rows[0] else prompts
        return {**given(rows), "columns": prompts["columns"]}


Collate = CollatePrompts | CollateTexts | CollateLabelled | CollatePairs | CollateUnpaired | CollatePreferences
