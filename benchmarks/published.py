"""What would the published analysis say of these runs, and what is true of them? Reads a comparison.

grade-compare --config configs/paper_compat.yaml --out OUT -- …
python benchmarks/published.py OUT
"""

import sys
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
from grade_lightning_cli.report.reading import read
from grade_lightning_cli.report.runs import Run
from scipy.stats import ttest_ind

FIGURES: dict[str, Callable[[Run], float]] = {
    "test reward": lambda run: run.test["reward"],
    "validation, first": lambda run: curve(run, "val/reward")[0],
    "validation, best": lambda run: curve(run, "val/reward").max(),
    "best validation − test": lambda run: curve(run, "val/reward").max() - run.test["reward"],
    "“gradient variance”": lambda run: curve(run, "grad/across_tensor_std").mean(),
    "its mean norm": lambda run: curve(run, "grad/norm").mean(),
    "published KL, first step": lambda run: curve(run, "published/kl")[0],
    "published KL, last 100 steps": lambda run: late(run, "published/kl"),
    "true KL per token, last 100 steps": lambda run: late(run, "train/kl_per_token"),
    "mean log-ratio of the samples, last 100 steps": lambda run: (
        late(run, "train/kl_k1") / late(run, "train/response_length")
    ),
    "“reward variance”": lambda run: stability(curve(run, "train/reward")),
    "true test KL, nats per sequence": lambda run: run.test["kl"],
}


def curve(run: Run, name: str) -> np.ndarray:
    """Values of a logged scalar; NaN where it was not logged."""
    return run.curves[name].values if name in run.curves else np.array([np.nan])


def late(run: Run, name: str) -> float:
    """Mean over the last 100 steps; each step is logged."""
    return float(curve(run, name)[-100:].mean())


def stability(rewards: np.ndarray) -> float:
    """Mean variance within windows of 50 steps, of which the last is left out."""
    starts = range(0, len(rewards) - 50, 50)
    return float(np.mean([rewards[start : start + 50].var() for start in starts])) if starts else float("nan")


def significance(methods: dict[str, list[Run]]) -> None:
    """Print what its t-tests say: training rewards of the last fifth of one run each, as if they were independent."""
    for one, two in combinations(methods, 2):
        both = [(a, b) for a in methods[one] for b in methods[two] if a.seed == b.seed]
        ends = [[curve(run, "train/reward") for run in pair] for pair in both]
        p = [float(ttest_ind(*(x[-len(x) // 5 :] for x in pair)).pvalue) for pair in ends]
        print(f"{one} and {two}: significant by {sum(x < 0.05 for x in p)} of {len(p)} seeds, each alone")


def main(folder: str) -> None:
    """Print a table in Markdown, mean ± standard deviation over the seeds."""
    study = read([Path(folder)])
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
    significance(methods)


if __name__ == "__main__":
    main(*sys.argv[1:])
