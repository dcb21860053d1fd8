"""Verifiers: rewards that check an answer by a rule. 1 where it holds, 0 where it does not."""

import json
import math
import re
from abc import abstractmethod
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grade_lightning.errors import InputError, check_range
from grade_lightning.records import Rollout

from .base import Reward

_NUMBER = re.compile(r"[-+−]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")
_FENCE = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL)


class Verifier(Reward):
    """Checks each completion, perhaps against a column of the data. A subclass implements :meth:`check`.

    Args:
        column: with the right answers; None where none are needed.
    """

    def __init__(self, column: str | None = None) -> None:
        super().__init__()
        self.column = column

    @abstractmethod
    def check(self, completion: str, answer: Any) -> float | None:
        """The score of a completion; None to abstain.

        Args:
            completion: its text.
            answer: of its row, in the column.
        """

    def forward(self, rollout: Rollout) -> Tensor:
        """Scores, (B,); NaN where the right answer is None.

        Raises:
            InputError: the data have no such column.
        """
        answers: list[Any] = [""] * len(rollout.completions)
        if self.column is not None:
            if self.column not in rollout.columns:
                there = ", ".join(map(repr, rollout.columns)) or "none"
                raise InputError(
                    f"reward {self.name}: the data have no column '{self.column}' with the right answers; their "
                    f"columns are {there}; name the one that has them by --model.reward.column"
                )
            answers = rollout.columns[self.column]
        scores = [
            None if answer is None else self.check(completion, answer)
            for completion, answer in zip(rollout.completions, answers, strict=True)
        ]
        numbers = [math.nan if score is None else score for score in scores]
        return torch.tensor(numbers, dtype=torch.float32, device=rollout.completion_ids.device)


class FormatReward(Verifier):
    r"""Whether a regular expression is found in the completion. A dot also stands for a new line.

    Args:
        pattern: the expression; `\A` and `\Z` are the beginning and the end of the completion.

    Example:
        >>> FormatReward(r"\A<think>.*</think>").check("<think>So\nit is.</think> 4", "")
        1.0
    """

    def __init__(self, pattern: str) -> None:
        super().__init__()
        self.pattern = _compiled(pattern, self.name)

    def check(self, completion: str, answer: Any) -> float:
        """1 where it is found."""
        return float(self.pattern.search(completion) is not None)


class ExactMatch(Verifier):
    r"""Whether the answer is the right one, white space at its ends apart.

    Args:
        column: with the right answers.
        pattern: what the answer is in the completion: the first group of its last match, or all of it; None: the
            answer is the whole completion.
        ignore_case: whether case does not matter.

    Example:
        >>> ExactMatch(pattern=r"Answer: (\w+)").check("It rains. Answer: Paris", "paris ")
        1.0
    """

    def __init__(self, column: str = "answer", pattern: str | None = None, ignore_case: bool = True) -> None:
        super().__init__(column)
        self.pattern = None if pattern is None else _compiled(pattern, self.name)
        self.ignore_case = ignore_case

    def check(self, completion: str, answer: Any) -> float:
        """1 where it is the same."""
        said, right = _extracted(self.pattern, completion), str(answer).strip()
        if said is not None and self.ignore_case:
            said, right = said.casefold(), right.casefold()
        return float(said == right)


class NumericMatch(Verifier):
    r"""Whether the last number of the completion is the last one of the right answer.

    Args:
        column: with the right answers, as numbers or as texts that end with one, such as GSM8K's.
        pattern: what the answer is in the completion: the first group of its last match, or all of it; None: the
            answer is the whole completion.
        tolerance: the largest difference, relative to the right number where that is above 1.

    Example:
        >>> NumericMatch().check("2 and 2 is 4, so it costs $1,004.00.", "He pays 1004.\n#### 1004")
        1.0
    """

    def __init__(self, column: str = "answer", pattern: str | None = None, tolerance: float = 1e-6) -> None:
        super().__init__(column)
        check_range("[0, inf)", "NumericMatch", tolerance=tolerance)
        self.pattern = None if pattern is None else _compiled(pattern, self.name)
        self.tolerance = tolerance

    def check(self, completion: str, answer: Any) -> float:
        """1 where they are the same.

        Raises:
            InputError: the right answer holds no number.
        """
        right = _number(str(answer))
        if right is None:
            raise InputError(
                f"reward {self.name}: column '{self.column}' holds {answer!r:.60}, which has no number; write one, or "
                "None"
            )
        said = _number(_extracted(self.pattern, completion) or "")
        return float(said is not None and abs(said - right) <= self.tolerance * max(1.0, abs(right)))


class JSONSchema(Verifier):
    """Whether the completion is JSON that fits a schema; in a fence of three backticks or without. Needs `jsonschema`.

    Args:
        schema: the schema, or the path of a file with it; None: any JSON.
    """

    def __init__(self, schema: dict[str, Any] | str | None = None) -> None:
        super().__init__()
        library = _library("jsonschema", self.name)
        if isinstance(schema, str):
            try:
                schema = json.loads(Path(schema).read_text())
            except (OSError, ValueError) as error:
                raise InputError(f"reward {self.name}: {schema} cannot be read as JSON ({error})") from error
        try:
            kind = library.validators.validator_for(schema or {})
            kind.check_schema(schema or {})
        except library.exceptions.SchemaError as error:
            raise InputError(f"reward {self.name}: this is not a JSON schema ({error.message})") from error
        self.validator = kind(schema or {})

    def check(self, completion: str, answer: Any) -> float:
        """1 where it fits."""
        fenced = _FENCE.findall(completion)
        try:
            value = json.loads(fenced[-1] if fenced else completion)
        except (ValueError, RecursionError):
            return 0.0
        return float(self.validator.is_valid(value))


class MathAnswer(Verifier):
    r"""Whether the answer is mathematically the right one, by `math-verify`: `\frac{1}{2}` is 0.5. Needs `math-verify`.

    It abstains where the right answer itself cannot be read.

    Args:
        column: with the right answers, as LaTeX or as plain expressions.
    """

    def __init__(self, column: str = "answer") -> None:
        super().__init__(column)
        self.library = _library("math_verify", self.name)

    def check(self, completion: str, answer: Any) -> float | None:
        """1 where it is equal; None where the right answer cannot be read."""
        text = str(answer)
        right = self.library.parse(text) or self.library.parse(f"${text}$")
        return float(self.library.verify(right, self.library.parse(completion))) if right else None


def _compiled(pattern: str, name: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise InputError(f"reward {name}: pattern {pattern!r} is not a regular expression ({error})") from error


def _extracted(pattern: re.Pattern[str] | None, text: str) -> str | None:
    """The first group of the last match, or all of it; None where there is no match."""
    if pattern is None:
        return text.strip()
    found = list(pattern.finditer(text))
    if not found:
        return None
    return str(found[-1].group(1 if pattern.groups else 0) or "").strip()


def _number(text: str) -> float | None:
    """The last number of a text, without its thousands separators.

    Example:
        >>> _number("Of 1,200 there are −3.5 left."), _number("none")
        (-3.5, None)
    """
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "").replace("−", "-")) if found else None


def _library(module: str, name: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise InputError(
            f"reward {name}: needs {module.replace('_', '-')}, which is not installed; "
            "pip install 'grade-lightning[verifiers]'"
        ) from error
