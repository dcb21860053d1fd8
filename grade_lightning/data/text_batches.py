"""Whole texts to learn from, and which of their tokens are learned."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grade_lightning.data.conversations import encode_conversation
from grade_lightning.data.cuts import Cut
from grade_lightning.data.texts import text_of
from grade_lightning.policies.chat import Chat, chat_of
from grade_lightning.policies.encoding import encode_all, encode_completions, encode_texts
from grade_lightning.policies.padding import pad

Row = dict[str, Any]
Learned = tuple[list[int], list[int]]
"""Tokens, and 1 for each that is learned."""


class TextBatch(TypedDict):
    """Texts, padded on the right, and 1 for the tokens that are learned; each (`[B, T]`)."""

    input_ids: Tensor
    attention_mask: Tensor
    loss_mask: Tensor


class LabelledBatch(TypedDict):
    """Texts, padded on the right (`[B, T]`), and their labels (`[B]`)."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


@dataclass
class CollateTexts:
    """Make a `TextBatch` of whole texts, cut to `max_tokens`, with an end where it fits.

    Of `messages` what the assistant says is learned, of `prompt` and `completion` the completion, of `text` all.
    """

    tokenizer: PreTrainedTokenizerBase
    max_tokens: int
    ends: Sequence[int] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)
    cut: Cut = field(default_factory=Cut)
    _told: bool = False

    def __call__(self, rows: Sequence[Row]) -> TextBatch:
        """Tokenise and pad."""
        name, (ids, masks) = self._name(rows), self._encode(rows)
        tokens, mask = pad(self.cut(name, ids, self.max_tokens), self.tokenizer)
        learned = torch.zeros_like(mask)
        for i, row in enumerate(masks):
            learned[i, : len(row)] = torch.tensor(row[: self.max_tokens])
        empty = int((learned[:, 1:].sum(-1) == 0).sum())
        if empty and not self._told:
            self._told = True
            rank_zero_warn(
                f"column '{name}': {empty} of {len(rows)} rows, the first of them, have nothing to learn in their "
                f"first {self.max_tokens} tokens; raise --data.max_text_tokens"
            )
        return {"input_ids": tokens, "attention_mask": mask, "loss_mask": learned}

    def _encode(self, rows: Sequence[Row]) -> tuple[list[list[int]], list[list[int]]]:
        kind = self._name(rows)
        if kind == "messages":
            found = [self._messages(row, row["messages"]) for row in rows]
        elif kind == "text":
            found = [(ids, [1] * len(ids)) for ids in encode_texts(self.tokenizer, list(map(text_of, rows)), self.ends)]
        else:
            found = self._completions(rows)
        return [ids for ids, _ in found], [mask for _, mask in found]

    def _completions(self, rows: Sequence[Row]) -> list[Learned]:
        """Prompts with their completions; those that are more than one message as their template writes them."""
        plain = [i for i, row in enumerate(rows) if not isinstance(row.get("completion"), list)]
        for i in plain:
            text_of({**rows[i], "prompt": ""})  # is there a completion?
        prompts = [chat_of(rows[i]["prompt"], rows[i], self.variables) for i in plain]
        ids = encode_all(self.tokenizer, prompts)
        answers = encode_completions(self.tokenizer, prompts, ids, [rows[i]["completion"] for i in plain], self.ends)
        found = {
            i: (begin + answer, [0] * len(begin) + [1] * len(answer))
            for i, begin, answer in zip(plain, ids, answers, strict=True)
        }
        return [
            found[i] if i in found else self._messages(row, row["prompt"] + row["completion"], len(row["prompt"]))
            for i, row in enumerate(rows)
        ]

    def _messages(self, row: Row, messages: Any, first: int = 0) -> Learned:
        chat = chat_of(messages, row, self.variables)
        assert isinstance(chat, Chat)
        return encode_conversation(self.tokenizer, chat, self.ends, first, "completion" if first else "messages")

    def _name(self, rows: Sequence[Row]) -> str:
        return next((name for name in ("messages", "text") if name in rows[0]), "prompt + completion")

    def lengths(self, rows: Sequence[Row]) -> dict[str, list[int]]:
        """Tokens of each row before anything is cut, by column."""
        return {self._name(rows): [len(ids) for ids in self._encode(rows)[0]]}


@dataclass
class CollateLabelled:
    """Make a `LabelledBatch`: the texts and the labels."""

    texts: CollateTexts

    def __call__(self, rows: Sequence[Row]) -> LabelledBatch:
        """Tokenise and pad."""
        labels = torch.tensor([row["label"] for row in rows], dtype=torch.int64)
        batch = self.texts(rows)
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}

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
