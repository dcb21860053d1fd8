"""Columns by other names, rows by a function, and rows in memory."""

from typing import Any

import datasets
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from grade_lightning.data import InMemory
from grade_lightning.data.mapping import rename, table_of, transform_rows
from grade_lightning.errors import InputError

QUESTIONS = [{"question": f"{i}+{i}?", "answer": f"#### {2 * i}"} for i in range(40)]
SIZES: dict[str, Any] = {"prompt_size": 20, "val_size": 5, "test_size": 5}


def test_mapped_columns_keep_their_names_unless_they_mean_something() -> None:
    rows = Dataset.from_dict({"chosen": ["a"], "rejected": ["b"], "question": ["c"], "prompt": ["d"]})
    mapped = rename(rows, {"chosen": "rejected", "rejected": "chosen", "prompt": "question"}, "mine")
    assert mapped[0] == {"chosen": "b", "rejected": "a", "question": "c", "prompt": "c"}


def test_a_column_that_is_not_there() -> None:
    with pytest.raises(InputError, match=r"mine: no column 'q' for --data.columns.prompt; name one of: question, an"):
        rename(table_of(QUESTIONS, "mine"), {"prompt": "q"}, "mine")


def test_rows_that_lack_a_column() -> None:
    assert table_of([{"a": 1}, {"b": "c"}], "mine")[:] == {"a": [1, None], "b": [None, "c"]}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"a": 1}, "b"], r"mine: row 1 is 'b'; write each row as a dict of columns"),
        ([{"a": 1}, {"a": [2]}], r"mine: a column mixes kinds of values \(.*\); write them alike"),
    ],
)
def test_rows_that_are_no_table(rows: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        table_of(rows, "mine")


def test_rows_are_changed_and_dropped() -> None:
    found = transform_rows(table_of(QUESTIONS, "mine"), lambda row: row if row["question"] < "2" else None, "mine")
    assert all(question < "2" for question in found["question"])
    assert 0 < len(found) < 40


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (KeyError("q"), r"mine: row 0: data.transform change raised KeyError: 'q'; fix the function"),
        (3, r"mine: row 0: data.transform change returned 3; return a dict or None"),
        (None, r"mine: data.transform change dropped all 40 rows"),
    ],
)
def test_functions_that_cannot_be_used(value: Any, message: str) -> None:
    def change(row: dict[str, Any]) -> Any:
        if isinstance(value, Exception):
            raise value
        return value

    with pytest.raises(InputError, match=message):
        transform_rows(table_of(QUESTIONS, "mine"), change, "mine")


@pytest.mark.parametrize("kind", ["list", "table", "stream"])
def test_rows_in_memory(kind: str) -> None:
    table = Dataset.from_list(QUESTIONS)
    rows: Any = {"list": QUESTIONS, "table": table, "stream": table.to_iterable_dataset()}[kind]
    source = InMemory(rows, test=QUESTIONS[:3], max_rows=30)
    assert {split: len(part) for split, part in source.read().items()} == {"train": 30, "test": 3}
    assert source.read()["train"][:] == table[:30]


def test_rows_without_an_end_and_without_rows() -> None:
    stream = Dataset.from_list(QUESTIONS).to_iterable_dataset()
    with pytest.raises(InputError, match=r"data.source \(train\): an IterableDataset has no known end, .* max_rows"):
        InMemory(stream).load()
    with pytest.raises(InputError, match=r"data.source \(test\): no rows; give at least one"):
        InMemory(QUESTIONS, test=[]).read()


def test_a_stream_of_the_hub_is_read_as_far_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    from grade_lightning.data import HubDataset, sources

    asked = []

    def load(name: str, config: str | None, split: str, streaming: bool) -> datasets.IterableDataset:
        asked.append((split, streaming))
        return Dataset.from_list([{"text": f"{split} {i}"} for i in range(9)]).to_iterable_dataset()

    monkeypatch.setattr(sources, "load_dataset", load)
    data = HubDataset("a/b", max_rows=2).load()
    assert asked == [("train", True), ("test", True)]
    assert data["train"]["text"][:] == ["train 0", "train 1"]


@pytest.mark.parametrize(
    "change", [lambda t: rename(t, {"text": "review"}, "a"), lambda t: transform_rows(t, dict, "a")]
)
def test_names_of_labels_are_not_lost(change: Any) -> None:
    features = Features({"review": Value("string"), "label": ClassLabel(names=["positive", "negative"])})
    rows = Dataset.from_dict({"review": ["good", "bad"], "label": [0, 1]}, features=features)
    assert change(rows)["label"][:] == ["positive", "negative"]
