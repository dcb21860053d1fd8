"""Rows are checked before anything is made of them; more of it is in `test_sources.py`."""

import pytest
from datasets import Dataset

from grade_lightning.data.normalise import normalise
from grade_lightning.errors import InputError


def test_conversations_need_a_prompt() -> None:
    with pytest.raises(InputError, match=r"mine: no column 'prompt' or 'messages' for data.chat"):
        normalise(Dataset.from_dict({"text": ["a"]}), "mine", chat=True)


def test_a_table_without_rows_of_any_kind() -> None:
    rows = Dataset.from_dict({"question": ["a"], "answer": ["b"]})
    with pytest.raises(InputError, match=r"mine: no column 'text' or 'prompt'; .*--data.columns.prompt NAME.*qu"):
        normalise(rows, "mine")


def test_breaks_are_lines_in_completions_too() -> None:
    rows = Dataset.from_dict({"prompt": ["a<br />"], "completion": ["b<br/>c"]})
    assert normalise(rows, "mine")[0] == {"prompt": "a\n", "completion": "b\nc"}
