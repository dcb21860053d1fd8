"""What a comparison was to have."""

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import as_number, read_yaml
from .runs import Run, Study


@dataclass(frozen=True)
class Planned:
    """What a comparison was to have."""

    methods: dict[str, Any]
    """What each has of its own."""
    seeds: list[int]
    origin: str
    """All that is equal for its runs."""
    points: list[dict[str, Any]]
    """Of the grid."""
    searched: list[int]
    """The seeds with which it is gone through; they may be none of those that are compared."""

    def absent(self, runs: Sequence[Run]) -> Iterator[str]:
        """What a method's finished runs lack."""
        seeds = {run.seed for run in runs if run.chosen} or {run.seed for run in runs}
        if lost := [str(seed) for seed in self.seeds if seed not in seeds]:
            yield f"no finished run with seed {', '.join(lost)}"
        for seed in self.searched:
            there = [run.about.get("setting") for run in runs if run.seed == seed]
            points = [",".join(f"{key}={x}" for key, x in point.items()) for point in self.points if point not in there]
            if points and there:
                yield f"no finished run with seed {seed} at {'; '.join(points)}"


def read_plan(path: Path, study: Study) -> Planned | None:
    """None where there is none, or none that is understood; that is said."""
    if path.is_file():
        study.plans.append(path.read_text(errors="replace"))
    plan = read_yaml(path)
    methods, seeds, grid, beta = (plan.get(name) for name in ("methods", "seeds", "grid", "beta"))
    if (
        not (isinstance(methods, dict) and isinstance(seeds, list) and isinstance(grid, dict))
        or not (methods and seeds and all(type(seed) is int for seed in seeds))
        or not all(isinstance(values, list) for values in grid.values())
        or not math.isfinite(as_number(beta))
    ):
        why = "not understood" if path.is_file() else "not there"
        study.missing.append(f"{path}: {why}; which runs are absent is not known, nor the β of the objective.")
        return None
    study.betas.add(as_number(beta))
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    origin = json.dumps({k: v for k, v in plan.items() if k not in ("methods", "seeds")}, sort_keys=True, default=str)
    own_seeds = plan.get("grid_seeds")
    searched = own_seeds if isinstance(own_seeds, list) and own_seeds else seeds[:1]
    return Planned({str(method): own for method, own in methods.items()}, seeds, origin, points, searched)
