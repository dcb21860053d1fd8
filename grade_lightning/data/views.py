"""Views: how the rows of the data are read, by name."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from grade_lightning.data.batches import Collate, CollateLabelled, CollatePairs, CollatePrompts, CollateTexts
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
        return CollatePrompts(tokenizer, limits.max_prompt_chars, limits.max_prompt_tokens)


class PairView(View):
    """Prompts with a chosen and a rejected completion to train on, and prompts to evaluate."""

    reads_prompts = True

    def check(self, rows: Dataset, numbers: Sequence[int]) -> None:
        """All three columns are there, and the completions are texts."""
        if missing := [name for name in ("prompt", "chosen", "rejected") if name not in rows.column_names]:
            raise InputError(
                f"data.source: no column {' or '.join(map(repr, missing))} to train on preferences; add a text "
                "'prompt' and two completions of it, 'chosen' and 'rejected'"
            )
        for name in ("chosen", "rejected"):
            for number, value in zip(numbers, rows[name], strict=True):
                if not isinstance(value, str):
                    raise InputError(
                        f"column '{name}', row {number} (split 'prompts'): {value!r:.60} is no text; write the "
                        "completion as text or drop the row"
                    )

    def collate(self, tokenizer: PreTrainedTokenizerBase, limits: Limits, train: bool) -> Collate:
        """`PairBatch` to train on, `PromptBatch` to evaluate."""
        if train:
            return CollatePairs(tokenizer, limits.max_text_tokens, limits.ends)
        return CollatePrompts(tokenizer, limits.max_prompt_chars, limits.max_prompt_tokens)


class TextView(View):
    """Whole texts."""

    def collate(self, tokenizer: PreTrainedTokenizerBase, limits: Limits, train: bool) -> Collate:
        """`TextBatch`."""
        return CollateTexts(tokenizer, limits.max_text_tokens, limits.ends)


class LabelledView(View):
    """Whole texts with labels."""

    split = "reward"

    def check(self, rows: Dataset, numbers: Sequence[int]) -> None:
        """There are labels."""
        if "label" not in rows.column_names:
            raise InputError("data.source: no column 'label' to train a reward model on; add it (0 or 1)")

    def collate(self, tokenizer: PreTrainedTokenizerBase, limits: Limits, train: bool) -> Collate:
        """`LabelledBatch`."""
        return CollateLabelled(CollateTexts(tokenizer, limits.max_text_tokens, limits.ends))


VIEWS: dict[batching.View, View] = {
    "prompts": PromptView(),
    "pairs": PairView(),
    "text": TextView(),
    "labelled": LabelledView(),
}
