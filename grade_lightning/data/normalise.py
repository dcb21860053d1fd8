"""Rows as they are used: columns checked, labels as numbers, conversations as prompts with completions."""

import re

from datasets import ClassLabel, Dataset

from grade_lightning.data.formats import as_chat, check_messages, with_prompts
from grade_lightning.errors import InputError

_LABELS = {0: 0, 1: 1, "0": 0, "1": 1, "negative": 0, "neg": 0, "positive": 1, "pos": 1}
_BREAK = re.compile(r"<br\s*/?>")


def normalise(rows: Dataset, name: str, chat: bool = False, system_prompt: str | None = None) -> Dataset:
    r"""Check the columns, find prompts, write labels as 0 and 1, and turn `<br />` into a newline.

    Args:
        rows: a dataset with a column `text`, `prompt` or `messages`, or with `chosen` and `rejected`.
        name: what to call it in an error.
        chat: whether prompts that are text become conversations.
        system_prompt: what begins the conversations, all prompts among them.

    Raises:
        InputError: a column or a value is not what it should be.

    Example:
        >>> rows = Dataset.from_dict({"text": ["Dull.<br />Slow."], "label": ["Negative"]})
        >>> normalise(rows, "reviews.csv")[0]
        {'text': 'Dull.\nSlow.', 'label': 0}
    """
    columns = rows.column_names
    if not {"text", "prompt", "messages"} & set(columns) and not {"chosen", "rejected"} <= set(columns):
        raise InputError(
            f"{name}: no column 'text' or 'prompt'; rename the one that holds it (--data.columns.prompt NAME), or "
            f"write 'messages' or 'chosen' and 'rejected': {', '.join(columns)}"
        )
    if not len(rows):
        raise InputError(f"{name}: no rows; give a file with at least one")
    table = with_prompts({column: rows[column][:] for column in columns}, name)
    for column in ("text", "prompt"):
        for i, value in enumerate(table.get(column, ())):
            _check_text(value, column, f"{name}: row {i}")
    if chat or system_prompt is not None:
        if "prompt" not in table:
            raise InputError(f"{name}: no column 'prompt' or 'messages' for data.chat and data.system_prompt; add one")
        table = as_chat(table, system_prompt)
    for column in {"text", "prompt", "completion", "chosen", "rejected"} & table.keys():
        table[column] = [_BREAK.sub("\n", v) if isinstance(v, str) else v for v in table[column]]
    if "label" in table:
        feature = rows.features["label"]
        if isinstance(feature, ClassLabel):
            table["label"] = [label if label is None else feature.int2str(label) for label in table["label"]]
        table["label"] = [_as_label(label, f"{name}: row {i}") for i, label in enumerate(table["label"])]
    try:
        return Dataset.from_dict(table)
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{name}: its rows do not have the same kinds of values ({reason}); write them alike"
        ) from error


def _check_text(value: object, column: str, name: str) -> None:
    if isinstance(value, str):
        if value.strip():
            return
        raise InputError(f"{name}: '{column}' is empty; fill it in or drop the row")
    if column == "text":
        raise InputError(f"{name}: '{column}' is {value!r}; write a text")
    check_messages(value, column, name)


def _as_label(label: object, name: str) -> int:
    key = label.strip().lower() if isinstance(label, str) else label
    if not isinstance(key, str | int | float) or key not in _LABELS:
        raise InputError(f"{name}: 'label' is {label!r}; write 0 or 1, false or true, neg or pos, negative or positive")
    return _LABELS[key]
