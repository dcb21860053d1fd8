"""Views: how the rows of the data are read, by name."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from grade_lightning.data.batches import (
    Collate,
    CollateHeldOut,
    CollateLabelled,
    CollatePairs,
    CollatePreferences,
    CollatePrompts,
    CollateTexts,
    CollateUnpaired,
)
from grade_lightning.errors import InputError
from grade_lightning.records import batching

Split = Literal["reward", "prompts", "validation", "test"]


@dataclass(frozen=True)
class Limits:
    """Where texts are cut, and what ends them beside the tokenizer's own tokens."""

    max_prompt_chars: int
    max_prompt_tokens: int
    max_text_tokens: int
    ends: Sequence[int] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)
    """For the chat template."""


class View(ABC):
    """One way to read rows."""

    split: Split = "prompts"
    """What is trained on."""
    reads_prompts = False
    """Whether it is evaluated on prompts, whose length is checked beforehand."""

    def check(self, rows: Dataset, numbers: Sequence[int]) -> None:
        """Check the rows to train on.

        Args:
            rows: of the split.
            numbers: their numbers in the source.

        Raises:
            InputError: they cannot be read so.
        """
        return None

    @abstractmethod
    def collate(self, tokenizer: PreTrainedTokenizerBase, limits: Limits, train: bool) -> Collate:
        """How rows become a batch, to train on or to evaluate."""


class PromptView(View):
    """Prompts."""

    reads_prompts = True

    def collate(self, tokenizer: PreTrainedTokenizerBase, limits: Limits, train: bool) -> Collate:
        """`PromptBatch`."""
        return CollatePrompts(tokenizer, limits.max_prompt_chars, limits.max_prompt_tokens, limits.variables)


class PairView(View):
    """Prompts with a chosen and a rejected completion, of which evaluation may have prompts alone."""

    reads_prompts = True

    def check(self, rows: Dataset, numbers: Sequence[int]) -> None:
        """All three columns are there, and the completions are texts."""
        _check_pairs(rows, numbers, self.split)

    def collate(self, tokenizer: PreTrainedTokenizerBase, limits: Limits, train: bool) -> Collate:
        """`PairBatch`; to evaluate, `PromptBatch` where there are no completions."""
        pairs = CollatePairs(tokenizer, limits.max_text_tokens, limits.ends, limits.variables)
        return pairs if train else _held_out(pairs, limits)


class UnpairedView(View):
    """Prompts with a completion that is labelled desirable or not, of which evaluation may have prompts alone."""

    reads_prompts = True

    def check(self, rows: Dataset, numbers: Sequence[int]) -> None:
        """All three columns are there, the completions are texts, and there are both labels."""
        if missing := [name for name in ("prompt", "completion", "label") if name not in rows.column_names]:
            raise InputError(
                f"data.source: no column {' or '.join(map(repr, missing))} to train on labelled completions; add a "
                "'prompt', a 'completion' of it, and a 'label': true where it is desirable"
            )
        _check_texts(rows, numbers, self.split, "completion")
        if len(set(rows["label"])) == 1:
            raise InputError(
                f"column 'label' (split '{self.split}'): all rows have {bool(rows['label'][0])}, and there is nothing "
                "to tell apart; add rows of the other label"
            )

    def collate(self, tokenizer: PreTrainedTokenizerBase, limits: Limits, train: bool) -> Collate:
        """`UnpairedBatch`; to evaluate, `PromptBatch` where there are no completions."""
        rows = CollateUnpaired(tokenizer, limits.max_text_tokens, limits.ends, limits.variables)
        return rows if train else _held_out(rows, limits)


def _held_out(completions: CollatePairs | CollateUnpaired, limits: Limits) -> CollateHeldOut:
    sizes = limits.max_prompt_chars, limits.max_prompt_tokens
    return CollateHeldOut(completions.tokenizer, *sizes, limits.variables, completions=completions)


class PreferenceView(View):
    """Whole texts in pairs, of which one is preferred."""

    split = "reward"

    def check(self, rows: Dataset, numbers: Sequence[int]) -> None:
        """All three columns are there, the completions are texts, and margins are numbers."""
        _check_pairs(rows, numbers, self.split)
        for number, value in zip(numbers, rows["margin"] if "margin" in rows.column_names else (), strict=False):
            if value is not None and (not isinstance(value, (int, float)) or not math.isfinite(value)):
                raise InputError(
                    f"column 'margin', row {number}: {value!r:.60} is not a number; write one, or drop the row"
                )

    def collate(self, tokenizer: PreTrainedTokenizerBase, limits: Limits, train: bool) -> Collate:
        """`PreferenceBatch`."""
        return CollatePreferences(tokenizer, limits.max_text_tokens, limits.ends, limits.variables)


def _check_pairs(rows: Dataset, numbers: Sequence[int], split: str) -> None:
    if missing := [name for name in ("prompt", "chosen", "rejected") if name not in rows.column_names]:
        raise InputError(
            f"data.source: no column {' or '.join(map(repr, missing))} to train on preferences; add a text "
            "'prompt' and two completions of it, 'chosen' and 'rejected'"
        )
    for name in ("chosen", "rejected"):
        _check_texts(rows, numbers, split, name)


def _check_texts(rows: Dataset, numbers: Sequence[int], split: str, name: str) -> None:
    for number, value in zip(numbers, rows[name], strict=True):
        if not isinstance(value, str):
            raise InputError(
                f"column '{name}', row {number} (split '{split}'): {value!r:.60} is not a text; write the "
                "completion as text or drop the row"
            )


class TextView(View):
    """Whole texts."""

    def check(self, rows: Dataset, numbers: Sequence[int]) -> None:
        """A conversation ends with what the assistant says."""
        for number, messages in zip(numbers, rows["messages"] if "messages" in rows.column_names else (), strict=False):
            if (last := messages[-1]["role"]) != "assistant":
                raise InputError(
                    f"column 'messages', row {number}: its last message is of '{last}', and there is nothing to learn "
                    "after it; let it end with the assistant's, or drop the row"
                )

    def collate(self, tokenizer: PreTrainedTokenizerBase, limits: Limits, train: bool) -> Collate:
        """`TextBatch`."""
        return CollateTexts(tokenizer, limits.max_text_tokens, limits.ends, limits.variables)


class LabelledView(View):
    """Whole texts with labels."""

    split = "reward"

    def check(self, rows: Dataset, numbers: Sequence[int]) -> None:
        """There are labels."""
        if "label" not in rows.column_names:
            raise InputError("data.source: no column 'label' to train a reward model on; add it (0 or 1)")

    def collate(self, tokenizer: PreTrainedTokenizerBase, limits: Limits, train: bool) -> Collate:
        """`LabelledBatch`."""
        return CollateLabelled(CollateTexts(tokenizer, limits.max_text_tokens, limits.ends, limits.variables))


VIEWS: dict[batching.View, View] = {
    "prompts": PromptView(),
    "pairs": PairView(),
    "unpaired": UnpairedView(),
    "text": TextView(),
    "labelled": LabelledView(),
    "preferences": PreferenceView(),
}
