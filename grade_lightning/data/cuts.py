"""Cuts: what does not fit is cut, and never without a word."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

from datasets import Dataset
from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedTokenizerBase

from grade_lightning.errors import InputError

COUNTED = 10_000
"""So many rows of a split are counted at most, since the texts are tokenised for that."""
_BATCH = 1_000


@dataclass
class Cut:
    """Cuts rows of tokens, and warns of the first cut in a column unless it was said before.

    Example:
        >>> Cut(said={"text"})("text", [[1, 2, 3], [4]], 2)
        [[1, 2], [4]]
    """

    said: set[str] = field(default_factory=set)
    """Columns of which it was said."""

    def __call__(self, column: str, rows: Sequence[list[int]], longest: int) -> list[list[int]]:
        """Cut the rows of a column."""
        cut = sum(len(row) > longest for row in rows)
        if cut and column not in self.said:
            self.said.add(column)
            rank_zero_warn(
                f"column '{column}': {cut} of {len(rows)} rows, the first of them, are cut at {longest} tokens"
            )
        return [row[:longest] for row in rows]


@dataclass(frozen=True)
class PromptLengths:
    """Tokens of all prompts by split and column, before anything is cut."""

    tokenizer: PreTrainedTokenizerBase
    parts: dict[str, dict[str, list[int]]]

    @property
    def longest(self) -> int:
        """Of all of them."""
        return max((max(found, default=0) for part in self.parts.values() for found in part.values()), default=0)

    def check(self, numbers: Mapping[str, Sequence[int]], most: int, given: bool) -> None:
        """Check that prompts which are not cut are not too long.

        Args:
            numbers: of the rows of each split in the source.
            most: the most tokens of a prompt.
            given: whether the user said so.

        Raises:
            InputError: one is longer.
        """
        for name, found in self.parts.items():
            for number, length in zip(numbers[name], found.get("prompt", ()), strict=False):
                if length > most:
                    remedy = f"raise --data.max_prompt_tokens (now {most})"
                    if not given:
                        remedy = (
                            f"the model's context leaves room for {most} beside a completion; "
                            "lower --model.sampler.max_new_tokens"
                        )
                    raise InputError(
                        f"column 'prompt', row {number} (split '{name}'): {length} tokens; {remedy} or drop the row"
                    )


class _Measures(Protocol):
    def lengths(self, rows: Sequence[dict[str, Any]]) -> dict[str, list[int]]: ...


def token_lengths(
    collate: _Measures, rows: Dataset, most: int | None = None, forks: bool = False
) -> dict[str, list[int]]:
    """Tokens of each row before anything is cut, by column.

    Args:
        collate: tokenises the rows.
        rows: of a split.
        most: rows to look at, evenly spread; None for all.
        forks: whether processes are forked afterwards, of which tokenizers that ran in several threads would complain.
    """
    if most is not None and len(rows) > most:
        rows = rows.select(i * len(rows) // most for i in range(most))
    found: dict[str, list[int]] = {}
    with _one_thread() if forks else nullcontext():
        for start in range(0, len(rows), _BATCH):
            table = rows[start : start + _BATCH]
            batch = [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]
            for column, lengths in collate.lengths(batch).items():
                found.setdefault(column, []).extend(lengths)
    return found


def share_cut(lengths: Mapping[str, Sequence[int]], longest: int) -> dict[str, str]:
    """Which share of the rows is cut, for each column of which any is.

    Example:
        >>> share_cut({"chosen": [1, 9, 2, 3], "rejected": [1, 1, 2, 3]}, 4)
        {'chosen': "25% of 'chosen' (1 of 4 rows)"}
    """
    cuts = {column: sum(length > longest for length in found) for column, found in lengths.items()}
    return {
        column: f"{_percent(count / len(lengths[column]))} of '{column}' ({count:,} of {len(lengths[column]):,} rows)"
        for column, count in cuts.items()
        if count
    }


def _percent(share: float) -> str:
    return f"{share:.2%}" if share < 0.01 else f"{share:.0%}"


@contextmanager
def _one_thread() -> Iterator[None]:
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
