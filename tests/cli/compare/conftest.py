"""Comparisons whose runs are tiny, or ended without ever having begun."""

import json
from functools import partial
from importlib import import_module
from typing import Any

import pytest

from tests.cli.conftest import QUIET, SIZES, Shelf

Comparison = import_module("grade_lightning_cli.compare.comparison").Comparison  # its name once it is installed
plan = partial(import_module("grade_lightning_cli.compare.plan").plan, completions=32)
compare = import_module("grade_lightning_cli.compare").compare
GRID = {"model.optimizer.lr": [0.001, 0.1]}


def finish(comparison: Any, run: Any, objective: float | None, tested: bool = False) -> None:
    """As if the run had ended."""
    run.folder.mkdir(parents=True, exist_ok=True)
    validation = {} if objective is None else {"reward": objective}
    (run.folder / "run.json").write_text(json.dumps({"objective": objective, "validation": validation}))
    if tested:
        (run.folder / "test.json").write_text("{}")


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """What the command says when it leaves with status 2: one line."""
    with pytest.raises(SystemExit) as exit:
        compare(args)
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return str(line)


def arguments(shelf: Shelf) -> dict[str, Any]:
    """Of tiny runs on the small models."""
    flags = [*shelf.data, *(f for f in QUIET if "max_steps" not in f), *SIZES]
    pairs = dict(flag.removeprefix("--").split("=", 1) for flag in flags)
    own = {
        "trainer.log_every_n_steps": 1,
        "model.policy.path": str(shelf.policy),
        "model.sampler.max_new_tokens": 4,
        "data.batch_size": 4,
    }
    return {**pairs, "model.reward": "ClassifierReward", "model.reward.path": str(shelf.reward)} | own
