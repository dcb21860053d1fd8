"""The figures: Okabe and Ito's colours, with line styles and markers that tell them apart without colour."""

import io
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.artist import Artist
from matplotlib.figure import Figure

from .arms import Arm, trained_on
from .bands import Band, band, coarse, gap_band
from .curves import AXES, end, joined
from .diagnostics import noise_kind
from .estimates import measure
from .runs import Study
from .statistics import Array

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<")
NAMES = ("test", "frontier", "learning", "training", "noise")
TRAINING = {
    "train/reward": "training reward",
    "train/kl": "KL, nats per sequence",
    "train/entropy": "entropy, nats per token",
    "train/response_length": "length, tokens",
    "grad/norm": "gradient norm",
    "train/loss": "loss, each method’s own",
    "train/tau": "temperature τ of GRADE",
}
"""What is drawn of the training, where it was logged."""
KINDS: dict[str, dict[str, Any]] = {
    "svg": {"metadata": {"Date": None}},
    "png": {"dpi": 160, "metadata": {"Software": None}},
    "pdf": {"metadata": {"CreationDate": None}},
}
_STYLE = {
    "svg.hashsalt": "grade-report",
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 9,
    "lines.markersize": 4,
}


def draw(study: Study, arms: Sequence[Arm], measures: dict[str, str], beta: float | None) -> dict[str, Figure]:
    """All figures that there is something to see in, by name.

    Args:
        study: all runs.
        arms: the methods that are compared.
        measures: what is shown of the test, with its title.
        beta: coefficient of the KL in the objective.
    """
    with style.context(["default", _STYLE]):
        found = (
            test(arms, measures, beta), frontier(study, arms), learning(arms), training(arms), noise(arms)
        )  # fmt: skip
    return {name: figure for name, figure in zip(NAMES, found, strict=True) if figure is not None}


def save(figure: Figure, path: Path) -> None:
    """Write a figure, of the kind that the name ends in; the same figure gives the same bytes."""
    with style.context(["default", _STYLE]):
        figure.savefig(path, **KINDS[path.suffix[1:]])


def svg(figure: Figure) -> bytes:
    """A figure as SVG."""
    buffer = io.BytesIO()
    with style.context(["default", _STYLE]):
        figure.savefig(buffer, format="svg", **KINDS["svg"])
    return buffer.getvalue()


def look(index: int) -> dict[str, Any]:
    """Colour, line and marker of a method; no two of the first 63 have the same colour and marker."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": LINES[index % len(LINES)],
        "marker": MARKERS[index % len(MARKERS)],
    }


def _plain(label: str) -> str:
    """A name is no formula."""
    return label.replace("$", r"\$")


def _legend(figure: Figure) -> None:
    """One entry for each label, above all panels."""
    entries: dict[str, Artist] = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(_plain(label), handle)
    figure.legend(list(entries.values()), list(entries), loc="outside upper center", ncols=4, frameon=False)


def test(arms: Sequence[Arm], measures: dict[str, str], beta: float | None) -> Figure | None:
    """Test figures with their intervals, and the mean of every seed."""
    shown = [(i, arm) for i, arm in enumerate(arms) if arm.tested]
    if not shown:
        return None
    rows = -(-len(measures) // 2)
    figure = Figure(figsize=(7, (0.6 + 0.26 * len(shown)) * rows + 0.3), layout="constrained")
    panels = list(figure.subplots(rows, 2, sharey=True, squeeze=False).flat)
    for (name, title), axis in zip(measures.items(), panels, strict=False):
        for place, (i, arm) in enumerate(shown):
            if trained_on(arm, name):
                continue
            own = look(i)
            seeds = [measure(replace(arm, runs=[run]), name, beta).mean for run in arm.tested]
            axis.plot(seeds, [place] * len(seeds), own["marker"], color=own["color"], markerfacecolor="none", alpha=0.6)
            found = measure(arm, name, beta)
            width = [[found.half_width], [found.half_width]] if math.isfinite(found.half_width) else None
            axis.errorbar(
                [found.mean], [place], xerr=width, fmt=own["marker"], color=own["color"], markersize=7, capsize=3
            )
        axis.set(xlabel=f"test {title}", yticks=range(len(shown)), yticklabels=[_plain(arm.label) for _, arm in shown])
        axis.grid(False, axis="y")
        axis.locator_params(axis="x", nbins=5)
    panels[0].set_ylim(len(shown) - 0.5, -0.5)  # of all: they share it, and the first is on top
    for axis in panels[len(measures) :]:
        axis.remove()
    return figure


def frontier(study: Study, arms: Sequence[Arm]) -> Figure | None:
    """Validation reward against KL: the way of every run, and where it ended."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for run in study.runs:
        points = joined(run, "val/kl", "val/reward")
        if not len(points):
            continue
        shown = [i for i, arm in enumerate(arms) if run in arm.runs]
        of_method = [i for i, arm in enumerate(arms) if run.method == arm.method]
        own = look((shown or of_method)[0]) if of_method else look(0) | {"color": "0.5"}
        _, kl, reward = points.T
        axis.plot(kl, reward, own["linestyle"], color=own["color"], alpha=0.35, linewidth=0.8)
        bold = {"markersize": 9, "label": arms[shown[0]].label} if shown else {"markerfacecolor": "none"}
        if all(map(math.isfinite, end(run))):
            axis.plot(kl[-1:], reward[-1:], own["marker"], color=own["color"], **bold)
    if not axis.lines:
        return None
    axis.set(xlabel=r"KL($\pi\,\|\,\pi_{\mathrm{ref}}$), nats per sequence", ylabel="validation reward")
    _legend(figure)
    return figure


def learning(arms: Sequence[Arm]) -> Figure | None:
    """Validation reward, mean and range over seeds, against everything that a method may cost."""
    panels = {
        ("validation reward", label): [band(arm, "val/reward", axis) for arm in arms] for axis, label in AXES.items()
    }
    return _bands(arms, panels, sharey=True)


def training(arms: Sequence[Arm]) -> Figure | None:
    """What was logged on the way, mean and range over seeds, against steps."""
    panels = {
        (label, "optimizer steps"): [band(arm, name, "steps") for arm in arms] for name, label in TRAINING.items()
    }
    panels["training − validation reward", "optimizer steps"] = [gap_band(arm) for arm in arms]
    return _bands(arms, panels, sharey=False)


def _bands(arms: Sequence[Arm], panels: dict[tuple[str, str], list[Band | None]], sharey: bool) -> Figure | None:
    """Two panels side by side, where any method has a curve; norms are logarithmic."""
    shown = {labels: bands for labels, bands in panels.items() if any(bands)}
    if not shown:
        return None
    rows = (len(shown) + 1) // 2
    # no higher than a printed page
    figure = Figure(figsize=(7, (2.6 if rows < 3 else 2.0) * rows + 0.4), layout="constrained")
    axes = list(figure.subplots(rows, 2, sharey=sharey, squeeze=False).flat)
    for ((ylabel, xlabel), bands), axis in zip(shown.items(), axes, strict=False):
        for i, found in [(i, coarse(found)) for i, found in enumerate(bands) if found]:
            axis.plot(found.x, found.mean, label=arms[i].label, **look(i))
            axis.fill_between(found.x, found.low, found.high, color=look(i)["color"], alpha=0.15, linewidth=0)
        axis.set(xlabel=xlabel, ylabel=ylabel, yscale="log" if "norm" in ylabel else "linear")
        axis.locator_params(axis="x", nbins=5)
    for axis in axes[len(shown) :]:
        axis.remove()
    _legend(figure)
    return figure


def noise(arms: Sequence[Arm]) -> Figure | None:
    """Variance and signal-to-noise ratio of a step's gradient, every seed, with the callback's own intervals."""
    kind = noise_kind(arms)
    names = [f"{kind}/{name}" for name in ("variance", "snr", "relative_std_high", "relative_std_low")]
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    ends: list[tuple[str, Array, Array]] = []
    for i, arm in enumerate(arms):
        for run in arm.runs:
            points = joined(run, *names)
            if not len(points):
                continue
            few = np.unique(np.linspace(0, len(points) - 1, 12).astype(int))
            step, variance, snr, *noise = points[few].T
            left.plot(step, np.where(variance > 0, variance, np.nan), label=arm.label, linewidth=0.8, **look(i))
            step = step + 0.008 * step[-1] * (i - (len(arms) - 1) / 2)  # else the intervals hide each other
            right.plot(step, snr, label=arm.label, linewidth=0.8, **look(i))
            with np.errstate(divide="ignore"):
                ends.append((look(i)["color"], step[snr > 0], np.array([snr, *(1 / np.array(noise) ** 2)])[:, snr > 0]))
    if not left.lines:
        return None
    known = np.concatenate([x.ravel() for _, _, x in ends])
    known = known[np.isfinite(known) & (known > 0)]
    left.set(xlabel="optimizer step", ylabel="variance of a step's gradient, norm²", yscale="log")
    right.set(xlabel="optimizer step", ylabel="|G|² / variance of a step's gradient", yscale="log")
    if len(known):
        for colour, step, (_, low, high) in ends:
            right.vlines(step, low.clip(0.7 * known.min()), high.clip(None, 1.4 * known.max()), color=colour, alpha=0.4)
    _legend(figure)
    return figure
