"""Tools as environments: a calculator, and a search over a folder of texts."""

import ast
import operator
import re
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from grade_lightning.errors import InputError, check_range

from .environment import Environment, Message


class Calculator(Environment):
    r"""Answers a turn in which the policy asks for a calculation; a turn that asks for none is its last.

    Args:
        pattern: finds the term in a turn, as its first group.
        answer: what is said, with `{value}`.
        calls: terms that are answered; a turn that asks for one more is the last, too.

    Example:
        >>> tool = Calculator()
        >>> tool.reset({})
        []
        >>> tool.step("12 boxes of 7 are <calc>12 * 7</calc>")
        ([{'role': 'tool', 'content': ' = 84\n'}], None, False)
        >>> tool.step("The answer is 84.")
        ([], None, True)
    """

    def __init__(self, pattern: str = r"<calc>(.*?)</calc>", answer: str = " = {value}\n", calls: int = 4) -> None:
        check_range("[1, inf)", "Calculator", calls=calls)
        self.pattern, self.answer, self.calls = _compiled(pattern, "Calculator"), answer, calls

    def reset(self, row: dict[str, Any]) -> list[Message]:
        """Begin."""
        self.left = self.calls
        return []

    def step(self, text: str) -> tuple[list[Message], float | None, bool]:
        """The value of the last term, or what is wrong with it."""
        terms = self.pattern.findall(text)
        if not terms or not self.left:
            return [], None, True
        self.left -= 1
        return [{"role": "tool", "content": self.answer.format(value=calculated(terms[-1]))}], None, False


_OPERATORS: dict[type, Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}


def calculated(term: str) -> str:
    """The value of a term of numbers, + − * / // % and brackets; what else it holds is never run.

    Example:
        >>> calculated("(1,200 + 34) / 2"), calculated("0.1 + 0.2"), calculated("7 / 0"), calculated("open('x')")
        ('617', '0.3', 'error: division by zero', 'error: not a term')
    """
    try:
        plain = " ".join(term.replace(",", "").replace("×", "*").replace("÷", "/").split())
        value = _value(ast.parse(plain, mode="eval").body)
    except (ZeroDivisionError, OverflowError) as error:
        return f"error: {'division by zero' if isinstance(error, ZeroDivisionError) else 'too large'}"
    except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError):
        return "error: not a term"
    return f"{value:.10g}"


def _value(node: ast.AST) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        return float(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.operand))
    raise ValueError("not a term")


class Search(Environment):
    """Answers a turn in which the policy searches, with the paragraph that shares most words; else it is the last.

    Args:
        folder: of text files, each of paragraphs with an empty line between them.
        pattern: finds the words in a turn, as its first group.
        answer: what is said, with `{text}`.
        calls: searches that are answered.
    """

    def __init__(
        self,
        folder: str,
        pattern: str = r"<search>(.*?)</search>",
        answer: str = "\n{text}\n",
        calls: int = 4,
    ) -> None:
        check_range("[1, inf)", "Search", calls=calls)
        self.pattern, self.answer, self.calls = _compiled(pattern, "Search"), answer, calls
        self.paragraphs = _paragraphs(folder)

    def reset(self, row: dict[str, Any]) -> list[Message]:
        """Begin."""
        self.left = self.calls
        return []

    def step(self, text: str) -> tuple[list[Message], float | None, bool]:
        """The paragraph, or `nothing found`."""
        asked = self.pattern.findall(text)
        if not asked or not self.left:
            return [], None, True
        self.left -= 1
        words = _words(asked[-1])
        shared = [(words & own).total() / (1 + own.total()) ** 0.5 for _, own in self.paragraphs]
        best = max(range(len(shared)), key=shared.__getitem__)
        found = self.paragraphs[best][0] if shared[best] else "nothing found"
        return [{"role": "tool", "content": self.answer.format(text=found)}], None, False


@cache
def _paragraphs(folder: str) -> list[tuple[str, Counter[str]]]:
    """Of all text files of a folder, with their words; read once for all episodes."""
    files = sorted(Path(folder).glob("*.txt"))
    texts = [part.strip() for file in files for part in re.split(r"\n\s*\n", file.read_text(encoding="utf-8"))]
    found = [(text, _words(text)) for text in texts if text]
    if not found:
        raise InputError(f"Search: {folder}: no text in *.txt files; name a folder that has some")
    return found


def _words(text: str) -> Counter[str]:
    return Counter(re.findall(r"\w+", text.lower()))


def _compiled(pattern: str, owner: str) -> re.Pattern[str]:
    try:
        found = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise InputError(f"{owner}.pattern: {pattern!r} is not a regular expression ({error}); fix it") from error
    if found.groups != 1:
        raise InputError(f"{owner}.pattern: {pattern!r} has {found.groups} groups; put one around what is asked")
    return found
