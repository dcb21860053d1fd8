"""Preferences whose prompt is what both completions begin with."""

from typing import Any

import pytest
from datasets import Dataset

from grade_lightning.data.pairs import split_pair
from grade_lightning.data.sources import normalise
from grade_lightning.errors import InputError

HUMAN = "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: A word?\n\nAssistant:"
ASK = {"role": "user", "content": "A?"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("B.", "C."))


@pytest.mark.parametrize(
    ("chosen", "rejected", "parts"),
    [
        (f"{HUMAN} It is.", f"{HUMAN} It was.", (HUMAN, " It is.", " It was.")),  # not what the answers share
        (f"{HUMAN} It is.", f"{HUMAN} It is. So.", (HUMAN, " It is.", " It is. So.")),
        ("What now? Go on", "What now? Get up", ("What now?", " Go on", " Get up")),  # whole words
        ("One two", "One two three", ("One", " two", " two three")),  # neither is empty
        ([ASK, GOOD], [ASK, BAD], ([ASK], "B.", "C.")),
        ([ASK, GOOD, ASK, GOOD], [ASK, GOOD, ASK, BAD], ([ASK, GOOD, ASK], "B.", "C.")),
    ],
)
def test_the_prompt_is_what_both_begin_with(chosen: Any, rejected: Any, parts: tuple[Any, ...]) -> None:
    assert split_pair(chosen, rejected) == parts
    if isinstance(parts[0], str):
        assert parts[0] + parts[1] == chosen
        assert parts[0] + parts[2] == rejected


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [("a", "b"), ([GOOD], [BAD]), ([ASK, GOOD], [GOOD, BAD]), ([ASK, GOOD], [ASK, GOOD, ASK, BAD])],
)
def test_rows_that_share_no_prompt_are_refused(chosen: Any, rejected: Any) -> None:
    with pytest.raises(InputError, match=r"mine: row 1: no column 'prompt'.*add a 'prompt'"):
        split_pair(chosen, rejected, "mine: row 1")


def test_a_source_finds_the_prompts() -> None:
    rows = normalise(Dataset.from_dict({"chosen": [f"{HUMAN} A."], "rejected": [f"{HUMAN} B."], "id": [3]}), "mine")
    assert rows[0] == {"id": 3, "prompt": HUMAN, "chosen": " A.", "rejected": " B."}
