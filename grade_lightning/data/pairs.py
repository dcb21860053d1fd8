"""Preferences without a prompt of their own: what both completions begin with."""

from itertools import takewhile
from typing import Any

from grade_lightning.data.texts import Prompt
from grade_lightning.errors import InputError

_ANSWER = "\n\nAssistant:"
"""What an answer begins with in the texts of Anthropic's HH dataset."""


def split_pair(chosen: Any, rejected: Any, name: str = "row") -> tuple[Prompt, str, str]:
    r"""Divide two whole texts, or two conversations, into their prompt and two completions.

    The prompt is what both begin with, up to the last answer or to the end of a word.

    Args:
        chosen: a text, or messages with "role" and "content".
        rejected: the same.
        name: what to call the row in an error.

    Raises:
        InputError: they begin with nothing in common, or differ in more than the last message.

    Example:
        >>> split_pair("\n\nHuman: One?\n\nAssistant: It is.", "\n\nHuman: One?\n\nAssistant: It is not.")
        ('\n\nHuman: One?\n\nAssistant:', ' It is.', ' It is not.')
        >>> split_pair("The sky is blue.", "The sky is black.")
        ('The sky is', ' blue.', ' black.')
    """
    if isinstance(chosen, str) and isinstance(rejected, str):
        prompt = _common_text(chosen, rejected)
        if prompt.strip():
            return prompt, chosen[len(prompt) :], rejected[len(prompt) :]
    elif isinstance(chosen, list) and isinstance(rejected, list):
        shared = min(len(chosen), len(rejected)) - 1
        if shared > 0 and chosen[:shared] == rejected[:shared] and len(chosen) == len(rejected):
            return chosen[:shared], chosen[-1]["content"], rejected[-1]["content"]
    raise InputError(
        f"{name}: no column 'prompt', and 'chosen' and 'rejected' do not begin alike and differ in their last part "
        "alone; add a 'prompt'"
    )


def _common_text(one: str, two: str) -> str:
    shared = "".join(a for a, b in takewhile(lambda pair: pair[0] == pair[1], zip(one, two, strict=False)))
    if _ANSWER in shared:
        return shared[: shared.rindex(_ANSWER) + len(_ANSWER)]
    if shared in (one, two):  # each must have something left
        shared = shared[:-1]
    return shared[: max((at for at, letter in enumerate(shared) if letter.isspace()), default=0)].rstrip()
