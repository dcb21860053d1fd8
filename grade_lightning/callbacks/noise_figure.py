"""A figure of the gradient's noise: how much at each probe, and which layers it is in."""

from itertools import takewhile
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_noise(
    figure: "Figure", history: list[tuple[int, float, float, float]], shares: dict[str, tuple[float, float]]
) -> None:
    """Draw how noisy the gradient was at each probe, and which layers the noise of the last one is in.

    Args:
        figure: an empty figure of matplotlib.
        history: step, relative standard deviation, and its interval.
        shares: variance by sampling and by the choice of prompts, for each layer.
    """
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.3])
    steps, middle, low, high = (torch.tensor(column, dtype=torch.float64) for column in zip(*history, strict=True))
    shown = torch.cat([x[x.isfinite() & (x > 0)] for x in (middle, low, high)])
    floor, ceiling = (0.7 * float(shown.min()), 1.4 * float(shown.max())) if len(shown) else (0.1, 10.0)
    left.vlines(steps, low.clamp(min=floor), high.clamp(max=ceiling), alpha=0.5)
    left.plot(steps, middle, marker="o", markersize=4)
    left.plot(steps[high.isinf()], torch.full_like(steps, ceiling)[high.isinf()], "^", color="C0", label="no upper end")
    left.set(xlabel="optimizer step", ylabel="√variance / |G| of a step's gradient", yscale="log")
    left.set_title("noise, with 95 % interval")
    left.grid(alpha=0.3)
    if high.isinf().any():
        left.legend()
    parts = [name.split(".") for name in shares]
    common = len(list(takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False))))
    rows = range(len(shares))[::-1]  # the first on top
    start = torch.zeros(len(shares))
    for index, (label, colour) in enumerate((("sampling", "#0072B2"), ("prompts", "#E69F00"))):
        values = torch.tensor([share[index] for share in shares.values()]).nan_to_num().clamp(min=0)
        right.barh(rows, values, left=start, label=label, color=colour)
        start = start + values
    right.set(xlabel="variance of a step's gradient (trace of the covariance)")
    right.set_yticks(rows, [".".join(part[min(common, len(part) - 1) :]) for part in parts])
    right.set_title(f"where it is, step {int(steps[-1])}")
    right.tick_params(axis="y", labelsize="small")
    right.legend()
