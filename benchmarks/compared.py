"""How good is each method of a comparison, and how many completions did it need for it? A table in Markdown.

The test reward has the interval of grade-report. Where a curve of validations passes the threshold is taken on a
straight line between two of them. A seed that does not reach it is left out of the mean, and that is said.

python benchmarks/compared.py sums_comparison --threshold 0.7
"""

import argparse
import math
from pathlib import Path

import numpy as np
from grade_lightning_cli.report.arms import Arm, arms
from grade_lightning_cli.report.curves import clean, position
from grade_lightning_cli.report.estimates import measure
from grade_lightning_cli.report.reading import read
from grade_lightning_cli.report.runs import Run

HEADER = [
    "method",
    "setting",
    "test reward",
    "std over seeds",
    "completions to {level:g}",
    "KL, nats",
    "entropy",
    "seeds",
]


def samples_to(level: float, run: Run) -> float:
    """Completions until the validation reward is as high; NaN where it never is.

    Args:
        level: the reward.
        run: with its curves.
    """
    curve = clean(run, "val/reward")
    spent = None if curve is None else position(run, curve, "train/reward_calls")
    if curve is None or spent is None or not (reached := curve.values >= level).any():
        return math.nan
    at = int(reached.argmax())
    if at == 0:
        return float(spent[0])
    pair = slice(at - 1, at + 1)
    return float(np.interp(level, curve.values[pair], spent[pair]))


def row(arm: Arm, level: float) -> list[str]:
    """The cells of a method."""
    reward, kl, entropy = (measure(arm, name) for name in ("reward", "kl", "entropy"))
    means = [run.test["reward"] for run in arm.tested]
    needed = [samples_to(level, run) for run in arm.runs]
    there = [value for value in needed if math.isfinite(value)]
    samples = f"{np.mean(there):,.0f}" if there else "not reached"
    if 0 < len(there) < len(needed):
        samples += f" ({len(there)} of {len(needed)} seeds)"
    spread = f"{np.std(means, ddof=1):.3f}" if len(means) > 1 else "–"
    return [
        arm.method,
        arm.setting.removeprefix("lr="),
        f"{reward.mean:.3f} ± {reward.half_width:.3f}",
        spread,
        samples,
        f"{kl.mean:.2f}",
        f"{entropy.mean:.3f}",
        str(len(arm.tested)),
    ]


def table(folder: Path, level: float) -> str:
    """The methods of a comparison that have been tested, the best first.

    Args:
        folder: of the comparison.
        level: the validation reward whose price is asked.
    """
    tested = [arm for arm in arms(read([folder])) if arm.tested]
    ordered = sorted(tested, key=lambda arm: -measure(arm, "reward").mean)
    header = [cell.format(level=level) for cell in HEADER]
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *(row(arm, level) for arm in ordered)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threshold", type=float, default=0.7)
    o = parser.parse_args()
    print(table(o.folder, o.threshold))
