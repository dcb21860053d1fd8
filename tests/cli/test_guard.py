"""What is no error of the user, and what becomes of it."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
from lightning.pytorch import Trainer

from grade_lightning.errors import InputError
from grade_lightning.rewards import Classifier
from tests.cli.conftest import SIZES, Shelf, load


def test_a_fault_of_ours_keeps_its_traceback(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what was made for people is shortened."""
    monkeypatch.setattr(Classifier, "forward", lambda *_: 1 / 0)
    fit: Any = load("fit")
    with pytest.raises(ZeroDivisionError):
        fit([*shelf.all, *SIZES])


def refuse_ours() -> None:
    try:
        Trainer(max_steps=-5)
    except Exception as error:
        raise InputError("ours") from error


@pytest.mark.parametrize(
    ("fault", "raised", "says"),
    [
        (lambda: Trainer(max_steps=-5), InputError, r"^`max_steps` must be .*; check the value$"),
        (refuse_ours, InputError, r"^ours$"),
        (lambda: 1 / 0, ZeroDivisionError, "division"),
    ],
)
def test_what_others_refuse_hides_neither_our_line_nor_a_fault(
    fault: Callable[[], object], raised: type[Exception], says: str
) -> None:
    refusals = import_module("grade_lightning_cli.guard").refusals
    with pytest.raises(raised, match=says), refusals():
        fault()
