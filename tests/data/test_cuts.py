import warnings
from typing import Any

import pytest

from grade_lightning.data.batches import CollatePrompts
from grade_lightning.data.cuts import Cut, share_cut, token_lengths
from grade_lightning.records import View
from tests.data.test_datamodule import Rows, labelled, letters, preferences, ready, texts


def test_a_first_cut_is_said_once() -> None:
    cut = Cut()
    with pytest.warns(UserWarning, match="column 'text': 1 of 2 rows.* at 2 tokens"):
        assert cut("text", [[1, 2, 3], [4]], 2) == [[1, 2], [4]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cut("text", [[1, 2, 3]], 2) == [[1, 2]]
        assert cut("chosen", [[1, 2]], 2) == [[1, 2]]


@pytest.mark.parametrize(("lengths", "percent"), [([9] * 3 + [1], "75%"), ([9] + [1] * 999, "0.10%"), ([1, 4], None)])
def test_share(lengths: list[int], percent: str | None) -> None:
    found = share_cut({"text": lengths}, 4)
    assert list(found) == ([] if percent is None else ["text"])
    assert percent is None or found["text"].startswith(f"{percent} of 'text' (")


def test_lengths_of_some_rows() -> None:
    collate, rows = (
        CollatePrompts(letters(), 200, 0),
        Rows({"prompt": ["a" * n for n in range(1, 101)]}).load()["train"],
    )
    assert token_lengths(collate, rows) == {"prompt": list(range(2, 102))}
    assert token_lengths(collate, rows, 4, forks=True) == {"prompt": [2, 27, 52, 77]}


@pytest.mark.parametrize(
    ("view", "options", "expected"),
    [
        ("text", {"max_text_tokens": 24}, ["split 'prompts': 100% of 'text' (30", "split 'validation': "]),
        ("labelled", {"max_text_tokens": 24}, ["split 'reward': ", "split 'validation': "]),
        (
            "prompts",
            {"max_prompt_tokens": 12},
            ["split 'prompts': 100% of 'prompt from text' (30", "split 'validation': "],
        ),
        ("text", {}, []),
        ("prompts", {}, []),
    ],
)
def test_one_line_for_each_split_that_is_cut(view: View, options: dict[str, Any], expected: list[str]) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        data = ready(Rows(labelled(100)), view, **options)
        for _ in range(2):
            for loader in (data.train_dataloader(), data.val_dataloader()):
                list(loader)
    lines = [str(line.message) for line in said if "cut" in str(line.message)]
    assert len(lines) == len(expected)
    for line, begin in zip(lines, expected, strict=True):
        assert line.startswith(begin)


def test_share_of_pairs_by_column() -> None:
    table = preferences(100)
    table["chosen"] = [text + "!" * 30 * (i % 2) for i, text in enumerate(table["chosen"])]
    data = ready(Rows(table), "pairs", max_text_tokens=20)
    star = [row["stars"] % 2 for row in data.splits["prompts"]]
    with pytest.warns(UserWarning, match=rf"split 'prompts': .*of 'chosen' \({sum(star)} of 30 rows\) are") as said:
        list(data.train_dataloader())
    assert "rejected" not in str(said[0].message)


def test_longest_prompt_of_the_data_is_the_limit() -> None:
    data = ready(Rows({"text": [f"{text.split('.')[0]}." for text in texts(100)]}))
    longest = max(len(text) for rows in data.splits.values() for text in rows["text"])
    assert data.max_prompt_tokens == longest + 1  # with BOS
