"""Pure functions on rows: the opening of a text, the text of a row, and splits that share nothing."""

import json
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from grade_lightning.errors import InputError
from grade_lightning.policies.chat import Messages as Messages
from grade_lightning.policies.chat import Prompt as Prompt

_SENTENCE_END = re.compile(r"""[.!?]+["'\u201d\u2019)\]]*$""")
# initials and "U.S." end with a dot and a single letter before it
_ABBREVIATION = re.compile(
    r"""["'(\[\u201c\u2018]*((\w\.)+|(mr|mrs|ms|dr|st|jr|sr|prof|vs|etc|vol)\.)["')\]\u201d\u2019]*""",
    re.IGNORECASE,
)


def opening(text: str, max_chars: int) -> str:
    """Take a text's first sentence, or its first two where both fit; cut a longer one between words.

    Example:
        >>> opening("Mr. Fox was late.  He ran! Nobody saw him.", max_chars=40)
        'Mr. Fox was late. He ran!'
        >>> opening("Mr. Fox was late. He ran! Nobody saw him.", max_chars=20)
        'Mr. Fox was late.'
        >>> opening("Mr. Fox was late.", max_chars=10)
        'Mr. Fox'
    """
    words = text.split()
    ends = [
        i
        for i, word in enumerate(words, 1)
        if i == len(words) or (_SENTENCE_END.search(word) and not _ABBREVIATION.fullmatch(word))
    ]
    for end in reversed(ends[:2]):
        sentences = " ".join(words[:end])
        if len(sentences) <= max_chars:
            return sentences
    start = sentences[: max_chars + 1]
    return start.rpartition(" ")[0] or start[:max_chars]


def text_of(row: Mapping[str, Any]) -> str:
    """Give the whole text of a row: its `text`, or its `prompt` and `completion` together.

    Example:
        >>> text_of({"prompt": "2 + 2 =", "completion": " 4"})
        '2 + 2 = 4'
    """
    parts = [row["text"]] if "text" in row else [row["prompt"], row.get("completion")]
    if not all(isinstance(part, str) for part in parts):
        raise InputError(
            "training on whole texts needs a column 'messages' or 'text', or 'prompt' and 'completion' as text; "
            f"add one (the rows have {', '.join(row)})"
        )
    return "".join(parts)


def prompt_of(row: Mapping[str, Any], max_chars: int) -> Prompt:
    """Give the prompt of a row: its `prompt` as it stands, else the opening of its `text`.

    Example:
        >>> prompt_of({"text": "It rained. We stayed in. We saw a film."}, max_chars=30)
        'It rained. We stayed in.'
    """
    prompt: Prompt = row["prompt"] if "prompt" in row else opening(row["text"], max_chars)
    return prompt


class Keys(NamedTuple):
    """What makes two rows the same text, and what makes them the same prompt."""

    texts: Sequence[str]
    prompts: Sequence[str]


def keys_of(table: Mapping[str, Sequence[Any]], max_chars: int) -> Keys:
    """Compare rows by their text without surrounding whitespace, and by their prompts.

    Example:
        >>> keys_of({"text": ["Dull. Slow. Long.", " Dull. Slow. Long."]}, max_chars=12)
        Keys(texts=['Dull. Slow. Long.', 'Dull. Slow. Long.'], prompts=['Dull. Slow.', 'Dull. Slow.'])
    """
    roles = ("prompt", "messages", "completion", "chosen", "rejected")
    names = [name for name in roles if name in table and "text" not in table] or ["text"]
    texts = ["\n".join(map(_key, values)) for values in zip(*(table[name] for name in names), strict=True)]
    if "prompt" in table:
        return Keys(texts, [_key(prompt) for prompt in table["prompt"]])
    return Keys(texts, [opening(text, max_chars) for text in table["text"]])


def _key(value: object) -> str:
    return value.strip() if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


class Splits(NamedTuple):
    """The row numbers of each split, and how many rows were left out for which reason."""

    rows: dict[str, list[int]]
    dropped: dict[str, int]


def split_rows(train: Keys, test: Keys | None, sizes: Mapping[str, int], test_size: int | None, seed: int) -> Splits:
    """Split rows at random so that no text and no prompt is in two splits.

    Of equal texts the first is kept. A prompt that two splits would share stays in "test", else in the
    earlier one of `sizes`. Where rows run out, splits stay short.

    Args:
        train: The rows for the splits in `sizes`.
        test: The rows for the split "test"; `None` leaves that split out.
        sizes: How many rows each split takes.
        test_size: How many rows the split "test" takes; `None` for all.
        seed: Of the shuffle.

    Example:
        >>> train = Keys(["a", "b", "b", "c", "d"], ["A", "B", "B", "C", "D"])
        >>> test = Keys(["d", "e"], ["D", "E"])
        >>> splits = split_rows(train, test, {"validation": 1, "prompts": 2}, None, seed=0)
        >>> splits.rows
        {'test': [0, 1], 'validation': [3], 'prompts': [0, 1]}
        >>> splits.dropped
        {'in_test': 1, 'duplicate': 1, 'same_prompt': 0}
    """
    rng = random.Random(seed)
    rows: dict[str, list[int]] = {}
    held_out: set[str] = set()
    prompts: set[str] = set()
    duplicates = 0
    if test is not None:
        kept = _first_of_each(test.texts)
        duplicates += len(test.texts) - len(kept)
        rng.shuffle(kept)
        rows["test"] = kept[:test_size]
        held_out.update(test.texts)
        prompts.update(test.prompts)
    unique = _first_of_each(train.texts)
    duplicates += len(train.texts) - len(unique)
    fresh = [i for i in unique if train.texts[i] not in held_out]
    dropped = {"in_test": len(unique) - len(fresh), "duplicate": duplicates, "same_prompt": 0}
    rng.shuffle(fresh)
    left = iter(fresh)
    for name, size in sizes.items():
        rows[name] = []
        while len(rows[name]) < size and (i := next(left, None)) is not None:
            if train.prompts[i] in prompts:
                dropped["same_prompt"] += 1
            else:
                rows[name].append(i)
        prompts.update(train.prompts[i] for i in rows[name])
    return Splits(rows, dropped)


def _first_of_each(texts: Sequence[str]) -> list[int]:
    first: dict[str, int] = {}
    for i, text in enumerate(texts):
        first.setdefault(text, i)
    return list(first.values())
