"""Columns by their names in the file, and rows by a function of the user's: what comes before the rows are checked."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import ClassLabel, Dataset

from grade_lightning.errors import InputError

Transform = Callable[[dict[str, Any]], dict[str, Any] | None]
"""A row in, a row out; None drops it."""

_ROLES = {"text", "label", "prompt", "completion", "messages", "chosen", "rejected", "margin", "trace", "tools"}
"""Columns that mean something here."""


def rename(rows: Dataset, columns: Mapping[str, str], name: str) -> Dataset:
    """Give columns the names that are used here.

    A column keeps its own name beside the new one, for rewards that ask for it, unless that name means something here.

    Args:
        rows: as they were read.
        columns: their names by the new ones.
        name: what to call the rows in an error.

    Raises:
        InputError: there is no such column.

    Example:
        >>> rename(Dataset.from_dict({"question": ["2+2?"]}), {"prompt": "question"}, "mine")[0]
        {'question': '2+2?', 'prompt': '2+2?'}
    """
    rows = with_label_names(rows)
    for new, old in columns.items():
        if old not in rows.column_names:
            raise InputError(
                f"{name}: no column {old!r} for --data.columns.{new}; name one of: {', '.join(rows.column_names)}"
            )
    found = {new: rows[old][:] for new, old in columns.items()}
    moved = {old for old in columns.values() if old in _ROLES}
    for column in (moved | found.keys()) & set(rows.column_names):
        rows = rows.remove_columns(column)
    kept = {column: rows[column][:] for column in rows.column_names}
    return Dataset.from_dict(kept | found)


def with_label_names(rows: Dataset) -> Dataset:
    """Labels that are numbers of names as these names: a table that is written anew does not know them.

    Example:
        >>> from datasets import Features
        >>> features = Features({"label": ClassLabel(names=["positive", "negative"])})
        >>> with_label_names(Dataset.from_dict({"label": [1, 0]}, features=features))[:]
        {'label': ['negative', 'positive']}
    """
    found: dict[str, list[str | None]] = {}
    for column, feature in rows.features.items():
        if isinstance(feature, ClassLabel):
            labels = rows[column][:]
            found[column] = [None if label is None or label < 0 else feature.int2str(label) for label in labels]
    return Dataset.from_dict({name: found.get(name) or rows[name][:] for name in rows.column_names}) if found else rows


def transform_rows(rows: Dataset, transform: Transform, name: str) -> Dataset:
    """Apply a function to each row.

    Args:
        rows: as they were read.
        transform: gets a row and returns it, changed or not, or another one; None drops it.
        name: what to call the rows in an error.

    Raises:
        InputError: the function raises, or returns something else.

    Example:
        >>> rows = Dataset.from_dict({"text": ["a", ""]})
        >>> transform_rows(rows, lambda row: row if row["text"] else None, "mine")[:]
        {'text': ['a']}
    """
    called, found = getattr(transform, "__name__", type(transform).__name__), []
    for i, row in enumerate(with_label_names(rows)):
        try:
            new = transform(row)
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise InputError(f"{name}: row {i}: data.transform {called} raised {reason}; fix the function") from error
        if new is not None and not isinstance(new, dict):
            raise InputError(f"{name}: row {i}: data.transform {called} returned {new!r:.60}; return a dict or None")
        found += [] if new is None else [new]
    if not found:
        raise InputError(f"{name}: data.transform {called} dropped all {len(rows)} rows; fix the function")
    return table_of(found, name)


def table_of(rows: Sequence[Mapping[str, Any]], name: str) -> Dataset:
    """Rows as a table with all of their columns; what a row does not have is None.

    Raises:
        InputError: they are no rows, or a column mixes kinds of values.

    Example:
        >>> table_of([{"prompt": "a"}, {"prompt": "b", "id": 1}], "mine")[:]
        {'prompt': ['a', 'b'], 'id': [None, 1]}
    """
    if bad := [i for i, row in enumerate(rows) if not isinstance(row, Mapping)]:
        raise InputError(f"{name}: row {bad[0]} is {rows[bad[0]]!r:.60}; write each row as a dict of columns")
    columns = dict.fromkeys(column for row in rows for column in row)
    try:
        return Dataset.from_dict({column: [row.get(column) for row in rows] for column in columns})
    except (TypeError, ValueError) as error:  # Arrow's are among them
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{name}: a column mixes kinds of values ({reason}); write them alike") from error
