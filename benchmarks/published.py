"""What would the published analysis say of these runs, and what is true of them? Reads a comparison.

grade-compare --config configs/paper_compat.yaml --out OUT -- …
python benchmarks/published.py OUT
"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from grade_lightning_cli.report import runs
from grade_lightning_cli.report.runs import Run

FIGURES: dict[str, Callable[[Run], float]] = {
    "test reward": lambda run: run.test["reward"],
    "validation, first": lambda run: curve(run, "val/reward")[0],
    "validation, best": lambda run: curve(run, "val/reward").max(),
    "best validation − test": lambda run: curve(run, "val/reward").max() - run.test["reward"],
    "“gradient variance”": lambda run: curve(run, "grad/across_tensor_std").mean(),
    "its mean norm": lambda run: curve(run, "grad/norm").mean(),
    "published KL, first step": lambda run: curve(run, "published/kl")[0],
    "published KL, last fifth": lambda run: late(run, "published/kl"),
    "true KL per token, last fifth": lambda run: late(run, "train/kl_per_token"),
    "mean log-ratio of the samples, last fifth": lambda run: (
        late(run, "train/kl_k1") / late(run, "train/response_length")
    ),
    "variance of the reward over the last fifth": lambda run: curve(run, "train/reward")[-last(run) :].var(),
    "true test KL, nats per sequence": lambda run: run.test["kl"],
}


def curve(run: Run, name: str) -> np.ndarray:
    """Values of a logged scalar; NaN where it was not logged."""
    return run.curves[name].values if name in run.curves else np.array([np.nan])


def last(run: Run) -> int:
    """Number of logged steps in the last fifth of a run."""
    return max(1, len(curve(run, "train/reward")) // 5)


def late(run: Run, name: str) -> float:
    """Mean over the last fifth of a run."""
    return float(curve(run, name)[-last(run) :].mean())


def main(folder: str) -> None:
    """Print a table in Markdown, mean ± standard deviation over the seeds."""
    study = runs.read([Path(folder)])
    methods: dict[str, list[Run]] = {}
    for run in study.runs:
        if run.test:
            methods.setdefault(run.method, []).append(run)
    print("| | " + " | ".join(f"{name} ({len(found)} seeds)" for name, found in methods.items()) + " |")
    print("|---" * (len(methods) + 1) + "|")
    for title, figure in FIGURES.items():
        cells = []
        for found in methods.values():
            values = np.array([figure(run) for run in found])
            cells.append(f"{values.mean():.4g} ± {values.std(ddof=1) if len(values) > 1 else np.nan:.2g}")
        print(f"| {title} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main(*sys.argv[1:])
