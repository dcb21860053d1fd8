"""What a run's test left behind."""

import json
import math
from pathlib import Path

import numpy as np

from .files import as_number, read_json
from .runs import Rows, Run


def read_test(run: Run, missing: list[str]) -> None:
    """Test metrics, and the prompts where every line is sound and their mean is that of the metrics."""
    lost = "its test is left out"
    test = {name: as_number(x) for name, x in read_json(run.folder / "test.json", missing, lost).items()}
    if not math.isfinite(test.get("reward", math.nan)):
        if test:
            missing.append(f"{run.folder / 'test.json'}: no finite reward in it; {lost}.")
        return
    path = run.folder / "test.jsonl"
    if path.exists():
        try:
            rows = _rows(path)
        except ValueError as error:
            missing.append(f"{path}: {error}; {lost}.")
            return
        reward = rows.figures["reward"]
        seen = reward[np.isfinite(reward)]
        if not len(seen) or abs(seen.mean() - test["reward"]) > 0.01 * seen.std() + 1e-5 * (1 + abs(test["reward"])):
            mean = f"{seen.mean():.4g} over its {len(rows.prompts)} lines" if len(seen) else "of no line"
            missing.append(f"{path}: mean reward {mean}, but {test['reward']:.4g} in test.json; {lost}.")
            return
        run.rows = rows
    else:
        missing.append(f"{path}: not there; no interval over prompts and no pairing by prompt for this run.")
    run.test = test


def _rows(path: Path) -> Rows:
    prompts, completions = [], []
    figures: list[dict[str, float]] = []
    # not splitlines(): a completion may hold other characters that end a line
    for number, line in enumerate(path.read_text(errors="replace").rstrip("\n").split("\n"), 1):
        try:
            row = json.loads(line)
            prompts.append(str(row["prompt"]))
            completions.append(str(row["completion"]))
            parts = {f"rewards/{name}": as_number(x) for name, x in (row.get("rewards") or {}).items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"line {number} is broken") from None
        figures.append({"reward": as_number(row.get("reward")), "kl": as_number(row.get("kl"))} | parts)
    names = dict.fromkeys(name for row in figures for name in row)
    return Rows(prompts, completions, {n: np.array([row.get(n, math.nan) for row in figures]) for n in names})
