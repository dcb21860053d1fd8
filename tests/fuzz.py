"""Properties over drawn cases: a few of them in the ordinary set, many in the slow one, the same in every run."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import SearchStrategy, tuples


def cases(few: int, many: int) -> pytest.MarkDecorator:
    """A test is given the number of its cases."""
    return pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.slow)], ids=["few", "many"])


def check_all(count: int, check: Callable[..., None], *strategies: SearchStrategy[Any]) -> None:
    """Draw that many cases and check each; the failing one that is shown is the simplest."""
    checked = 0

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(tuples(*strategies))
    def run(drawn: tuple[Any, ...]) -> None:
        nonlocal checked
        with torch.random.fork_rng(devices=[]):
            check(*drawn)
        checked += 1

    run()
    print(f"{checked} cases")
    assert checked >= count
