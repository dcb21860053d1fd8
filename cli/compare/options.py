"""Options of `grade-fit`: as a plan holds them, and as a command line has them."""

import math
from collections.abc import Iterator
from typing import Any

import yaml  # type: ignore[import-untyped]

from grade_lightning.errors import InputError


def option_names(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """All options by their full names, however they are nested."""
    for key, value in values.items():
        yield prefix + key.removesuffix("+")
        if isinstance(value, dict):
            yield from option_names(value, f"{prefix}{key}.")


def as_flags(key: str, value: Any) -> list[str]:
    """An option as it stands on a command line; several times where it has several values."""
    return [f"--{key}={_text(one)}" for one in (as_list(value) if repeatable(key) else [value])]


def option_pairs(args: list[str]) -> dict[str, Any]:
    """Options of `grade-fit` and their values.

    Example:
        >>> option_pairs(["--model.policy.path", "gpt2", "--config=a.yaml", "--config=b.yaml"])
        {'model.policy.path': 'gpt2', 'config': ['a.yaml', 'b.yaml']}
    """
    words = [word for arg in args for word in (arg.split("=", 1) if arg.startswith("--") else [arg])]
    if len(words) % 2 or not all(word.startswith("--") for word in words[::2]):
        raise InputError(f"after --: give options of grade-fit with one value each, not {' '.join(args)}")
    pairs: dict[str, Any] = {}
    for option, value in zip(words[::2], words[1::2], strict=True):
        key = option.removeprefix("--")
        if key in pairs and not repeatable(key):
            raise InputError(f"after --: {option} is given twice; give it once")
        pairs[key] = [*as_list(pairs[key]), value] if key in pairs else value
    return pairs


def repeatable(key: str) -> bool:
    """Whether an option may be given several times."""
    return key == "config" or key.endswith("+")


def as_list(value: Any) -> list[Any]:
    """One value is a list of one."""
    return value if isinstance(value, list) else [value]


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    text: str = yaml.safe_dump(value, default_flow_style=True, width=math.inf)
    return text.removesuffix("...\n").strip()
