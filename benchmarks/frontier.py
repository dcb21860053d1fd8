"""What reward does a method reach at each KL? Frontiers of runs with several β, in Markdown, and a figure.

The methods of a comparison are named after their β: `GradeSTE@0.003`, `GradeSTE@0.01`. What stands before the last
@ is a family. For each seed the points (KL, reward) of a family's test are joined by straight lines; the height
of its frontier is the mean of the line over a range of KL that all families and seeds cover. Families are compared
seed by seed.

python benchmarks/frontier.py frontier_runs --figure docs/figures/frontier.png
"""

import argparse
import math
from collections import defaultdict
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from grade_lightning_cli.report.arms import arms, judges
from grade_lightning_cli.report.estimates import over_seeds
from grade_lightning_cli.report.reading import read
from grade_lightning_cli.report.statistics import holm, paired_test
from scipy.integrate import trapezoid

Points = dict[str, dict[int, list[dict[str, float]]]]
"""Of each family, of each seed: the test of each β, in order of its KL."""


def family(method: str) -> tuple[str, float]:
    """Its name and β.

    Raises:
        ValueError: the name has no β.
    """
    name, _, beta = method.rpartition("@")
    try:
        return name or method, float(beta)
    except ValueError:
        raise ValueError(f"method {method}: name it with its β, such as {method}@0.003") from None


def points(tested: dict[tuple[str, int], dict[str, float]]) -> Points:
    """Sorted by family, seed and KL.

    Args:
        tested: test figures of each method and seed.
    """
    found: Points = defaultdict(lambda: defaultdict(list))
    for (method, seed), test in tested.items():
        found[family(method)[0]][seed].append(test | {"beta": family(method)[1]})
    return {name: {s: sorted(p, key=lambda t: t["kl"]) for s, p in seeds.items()} for name, seeds in found.items()}


def common_range(found: Points) -> tuple[float, float]:
    """The KL that all families and seeds cover.

    Raises:
        ValueError: there is none.
    """
    rows = [rows for seeds in found.values() for rows in seeds.values()]
    low, high = max(r[0]["kl"] for r in rows), min(r[-1]["kl"] for r in rows)
    if low >= high:
        raise ValueError(f"the frontiers share no range of KL ({low:.1f} to {high:.1f}); add values of β")
    return low, high


def height(rows: list[dict[str, float]], name: str, low: float, high: float) -> float:
    """Mean of the line through the points over a range of KL; exact, as it is straight between them."""
    kl, value = (np.array([row[key] for row in rows]) for key in ("kl", name))
    inner = kl[(kl > low) & (kl < high)]
    at = np.array([low, *inner, high])
    return float(trapezoid(np.interp(at, kl, value), at) / (high - low))


def tables(found: Points, names: list[str], low: float, high: float) -> str:
    """Points, heights and their differences."""
    lines = [["family", "β", "KL, nats", *names, "seeds"], ["---", *["--:"] * (len(names) + 3)]]
    for label, seeds in found.items():
        for beta in sorted({row["beta"] for rows in seeds.values() for row in rows}):
            rows = [row for rows in seeds.values() for row in rows if row["beta"] == beta]
            cells = [_over(row[key] for row in rows) for key in names]
            lines.append([label, f"{beta:g}", _over((row["kl"] for row in rows), 1), *cells, str(len(rows))])
    lines += [[], [f"height, {low:.1f} to {high:.1f} nats", *names], ["---", *["--:"] * len(names)]]
    heights = {
        (label, key): {s: height(rows, key, low, high) for s, rows in seeds.items()}
        for label, seeds in found.items()
        for key in names
    }
    lines += [[label, *(_over(heights[label, key].values()) for key in names)] for label in found]
    lines += [[], ["difference", *(cell for key in names for cell in (key, "p"))], ["---", *["--:"] * 2 * len(names)]]
    pairs = list(combinations(found, 2))
    cells = {key: _differences([(heights[a, key], heights[b, key]) for a, b in pairs]) for key in names}
    lines += [[f"{a} − {b}", *(x for key in names for x in cells[key][i])] for i, (a, b) in enumerate(pairs)]
    return "\n".join(f"| {' | '.join(line)} |" if line else "" for line in lines)


def _differences(pairs: list[tuple[dict[int, float], dict[int, float]]]) -> list[tuple[str, str]]:
    gaps = [np.array([a[s] - b[s] for s in a if s in b]) for a, b in pairs]
    tests = [paired_test(gap) for gap in gaps]
    corrected = iter(holm([t.p for t in tests if t is not None]))
    return [(_over(g), "–" if t is None else f"{next(corrected):.3f}") for g, t in zip(gaps, tests, strict=True)]


def _over(values: Iterable[float], digits: int = 3) -> str:
    e = over_seeds(list(values))
    return f"{e.mean:.{digits}f}" + ("" if math.isnan(e.half_width) else f" ± {e.half_width:.{digits}f}")


def draw(found: Points, names: list[str], path: Path) -> None:
    """A line through the means of each family, and a faint one for each seed."""
    figure, axes = plt.subplots(1, len(names), figsize=(5 * len(names), 4), squeeze=False, layout="constrained")
    for axis, name in zip(axes[0], names, strict=True):
        for i, (label, seeds) in enumerate(found.items()):
            for rows in seeds.values():
                axis.plot([r["kl"] for r in rows], [r[name] for r in rows], color=f"C{i}", alpha=0.2)
            betas = sorted({row["beta"] for rows in seeds.values() for row in rows})
            every = [[row for rows in seeds.values() for row in rows if row["beta"] == beta] for beta in betas]
            means = [[np.mean([row[key] for row in rows]) for rows in every] for key in ("kl", name)]
            axis.plot(*means, marker="o", color=f"C{i}", label=label)
        axis.set(xlabel="KL (nats per sequence)", ylabel=f"test {name}")
    axes[0][0].legend()
    figure.savefig(path, dpi=120)


def main(folders: list[Path], figure: Path | None, between: list[float] | None) -> None:
    """Print the tables."""
    compared = [arm for arm in arms(read(folders)) if arm.tested]
    found = points({(arm.method, run.seed): run.test for arm in compared for run in arm.tested})
    names = ["reward", *judges(compared)]
    low, high = between or common_range(found)
    print(tables(found, names, low, high))
    if figure is not None:
        draw(found, names, figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--between", type=float, nargs=2, help="range of KL; what all cover by default")
    o = parser.parse_args()
    try:
        main(o.folders, o.figure, o.between)
    except ValueError as error:
        parser.error(str(error))
