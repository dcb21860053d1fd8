"""Answers: what of a completion counts, and which completions of a batch say the same."""

from collections.abc import Callable


def last_line(completion: str) -> str:
    r"""The last line that is not empty, in small letters.

    Example:
        >>> last_line("2 + 2\nis Four \n")
        'is four'
    """
    return completion.strip().lower().rpartition("\n")[2].strip()


def answer_numbers(completions: list[str], answer: Callable[[str], str]) -> list[int]:
    r"""A number for each answer, from 0 on in the order in which they come up; −1: none.

    Args:
        completions: their texts.
        answer: the answer in a text; an empty one is none.

    Example:
        >>> answer_numbers(["so: 4", "hence\n4", "so: 4", ""], last_line)
        [0, 1, 0, -1]
    """
    numbers = {"": -1}
    return [numbers.setdefault(answer(text), len(numbers) - 1) for text in completions]
