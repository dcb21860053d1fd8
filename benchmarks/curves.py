"""How did reward, KL and entropy of some runs move? Reads TensorBoard logs, draws a PNG.

python benchmarks/curves.py curves.png runs/GradeSTE/version_0 runs/GradeSTE/version_1
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

PANELS = {"reward": "reward", "kl": "KL (nats per sequence)", "entropy": "entropy (nats per token)"}


def main(output: str, *runs: str) -> None:
    """Draw one line for each run, and its validations as points."""
    figure, axes = plt.subplots(1, len(PANELS), figsize=(4 * len(PANELS), 3), layout="constrained")
    for i, run in enumerate(runs):
        events = EventAccumulator(run)
        events.Reload()
        for axis, (name, label) in zip(axes, PANELS.items(), strict=True):
            for stage, style in {"train": {"alpha": 0.4}, "val": {"marker": "o"}}.items():
                points = events.Scalars(f"{stage}/{name}")
                steps, values = [point.step for point in points], [point.value for point in points]
                title = f"{Path(run).parts[-3]} ({stage})" if axis is axes[0] else None
                axis.plot(steps, values, color=f"C{i}", label=title, **style)
            axis.set(xlabel="optimizer step", ylabel=label)
    axes[0].legend(fontsize="x-small")
    figure.savefig(output, dpi=120)


if __name__ == "__main__":
    main(*sys.argv[1:])
