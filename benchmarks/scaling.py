"""How do time and memory of the training pass grow with length, vocabulary, batch and hops?

The training pass is what follows sampling and reward: loss and backward pass, the reference's forward pass included,
the optimizer not. One of the four is varied at a time around `--at`, for GradeSTE and RLOO on a GPT-2 of 4 × 256 with
random weights, prompts of 32 tokens and completions of full length. Seconds are medians over rounds, each of which
goes through all settings once; each setting has its completions sampled once, and a first pass that does not count;
the C library keeps freed memory, as the commands have it do.
Memory is the peak of a pass in a process of its own, after a first one, above what was there before it (weights,
reference, completions) and above one gradient of the parameters, which every method must have. It is tensors on a GPU,
else resident memory with the C library told to give freed tensors back at once.

Slopes are those of least-squares lines through the logarithms, between the ends that are given.

python benchmarks/scaling.py --figure docs/figures/scaling.png
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import linear_regression, median
from typing import NamedTuple

import torch
from common import HUGE_ALLOCATIONS, Memory, Prompts, Words, note, policy, wait

from grade_lightning.allocator import keep_freed_memory
from grade_lightning.methods import RLOO, GradeSTE
from grade_lightning.modules import AlignmentModule
from grade_lightning.policies import ChunkedPass, Policy
from grade_lightning.records import Experience
from grade_lightning.rollouts import Sampler

AXES = {
    "length": "tokens of a completion",
    "vocabulary": "tokens in the vocabulary",
    "batch": "completions",
    "hops": "hops",
}
METHODS = {
    "GradeSTE": {"color": "#0072B2", "marker": "o"},
    "RLOO": {"color": "#E69F00", "marker": "s", "linestyle": "--"},
}
GROUP, PROMPT = 4, 32


class Setting(NamedTuple):
    """One training pass."""

    method: str
    length: int
    vocabulary: int
    batch: int
    hops: int

    def policy(self, o: argparse.Namespace) -> Policy:
        """With room for the longest completion that is asked for."""
        torch.manual_seed(o.seed)
        positions = PROMPT + max([self.length, *o.length])
        found = policy(self.vocabulary, layers=o.layers, width=o.width, positions=positions).to(o.device)
        if o.chunk:
            found.training_pass = ChunkedPass(o.chunk)
        return found

    def module(self, shared: Policy) -> AlignmentModule:
        """The method."""
        reward, sampler = Words(self.vocabulary).to(shared.model.device), Sampler(max_new_tokens=self.length)
        if self.method == "RLOO":
            return RLOO(policy=shared, reward=reward, sampler=sampler, num_generations=GROUP)
        return GradeSTE(policy=shared, reward=reward, sampler=sampler, hops=self.hops)

    def collect(self, module: AlignmentModule, o: argparse.Namespace) -> Experience:
        """Its completions."""
        torch.manual_seed(o.seed)
        prompts = self.batch // GROUP if self.method == "RLOO" else self.batch
        batch = next(iter(Prompts(prompts, self.vocabulary, PROMPT)))
        return module.collect({name: x.to(o.device) if torch.is_tensor(x) else x for name, x in batch.items()})


def settings(o: argparse.Namespace) -> dict[str, list[Setting]]:
    """Those of each axis."""
    centre = dict(zip(AXES, o.at, strict=True))
    return {
        axis: [
            Setting(method, **centre | {axis: value})
            for method in METHODS
            if (axis, method) != ("hops", "RLOO")
            for value in getattr(o, axis)
        ]
        for axis in AXES
    }


def times(o: argparse.Namespace, wanted: list[Setting]) -> Iterator[tuple[Setting, float]]:
    """Seconds of each pass; policies of a vocabulary are one and the same."""
    policies: dict[int, Policy] = {}
    passes: dict[Setting, tuple[AlignmentModule, Experience]] = {}
    for turn in range(o.rounds + 1):
        for setting in wanted:
            if setting not in passes:
                if setting.vocabulary not in policies:
                    policies[setting.vocabulary] = setting.policy(o)
                module = setting.module(policies[setting.vocabulary])
                passes[setting] = (module, setting.collect(module, o))
            module, experience = passes[setting]
            module.policy.zero_grad(set_to_none=True)
            wait(o.device)
            clock = time.process_time if o.clock == "cpu" else time.perf_counter
            began = clock()
            module.loss(experience).loss.backward()
            wait(o.device)
            seconds = clock() - began
            note(f"round {turn} of {o.rounds}, {setting}: {seconds:.3f} s")
            if turn:
                yield setting, seconds
            module.policy.zero_grad(set_to_none=True)


def peak(setting: Setting) -> float:
    """Megabytes of a pass, from a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--peak-of", json.dumps(setting)]
    run = subprocess.run(command, env=os.environ | HUGE_ALLOCATIONS, stdout=subprocess.PIPE, check=True, text=True)
    megabytes: float = json.loads(run.stdout)
    note(f"memory, {setting}: {megabytes:.0f} MB")
    return megabytes


def peak_here(o: argparse.Namespace, setting: Setting) -> float:
    """The same in this process."""
    module = setting.module(setting.policy(o))
    experience = setting.collect(module, o)
    trained = [p for p in module.policy.parameters() if p.requires_grad]
    for _ in range(2):  # the first one also loads code
        module.policy.zero_grad(set_to_none=True)
        with Memory(o.device) as memory:
            module.loss(experience).loss.backward()
    return (memory.peak - sum(p.numel() * p.element_size() for p in trained)) / 1e6


def slope(values: dict[int, float], ends: tuple[int, int]) -> float:
    """Of log y over log x."""
    points = [(math.log(x), math.log(y)) for x, y in values.items() if ends[0] <= x <= ends[1] and y > 0]
    return linear_regression(*zip(*points, strict=True)).slope if len(points) > 1 else math.nan


def draw(found: dict[str, dict[str, dict[int, tuple[float, float]]]], path: Path) -> None:
    """Time above memory, along each axis."""
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(2, len(AXES), figsize=(12, 5), sharex="col", sharey="row", layout="constrained")
    for column, (axis, label) in enumerate(AXES.items()):
        for row in range(2):
            panel = grid[row, column]
            for method, points in found[axis].items():
                marker = METHODS[method] | {"markersize": 4, "label": method}
                panel.plot(list(points), [point[row] for point in points.values()], **marker)
            panel.set(yscale="log", xscale="linear" if axis == "hops" else "log")
            panel.grid(alpha=0.3)
        ticks = sorted({x for points in found[axis].values() for x in points})
        panel.set_xticks(ticks, [f"{x // 1024}k" if x >= 4096 else str(x) for x in ticks])
        panel.minorticks_off()
        panel.set(xlabel=label)
    grid[0, 0].set(ylabel="time of the training pass, s")
    grid[1, 0].set(ylabel="peak memory, MB")
    grid[0, 0].legend(fontsize="small")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--at", type=int, nargs=4, default=[64, 8192, 16, 0], metavar=tuple(AXES))
    parser.add_argument("--length", type=int, nargs="*", default=[16, 32, 64, 128, 256, 512])
    parser.add_argument("--vocabulary", type=int, nargs="*", default=[2**i for i in range(12, 18)])
    parser.add_argument("--batch", type=int, nargs="*", default=[4, 16, 64])
    parser.add_argument("--hops", type=int, nargs="*", default=[0, 1, 2, 4, 8])
    parser.add_argument("--ends", type=json.loads, default={"length": [64, 512]}, help="of the slopes, as JSON")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--chunk", type=int, default=0, help="positions of a ChunkedPass; 0: all at once")
    parser.add_argument("--rounds", type=int, default=3, help="0: memory alone")
    parser.add_argument("--no-memory", action="store_true", help="seconds alone")
    parser.add_argument("--jobs", type=int, default=1, help="processes that measure memory at the same time")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: seconds of the process, for a busy machine"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--figure", type=Path, help="where to draw the results")
    parser.add_argument("--peak-of", type=json.loads, help=argparse.SUPPRESS)
    o = parser.parse_args()
    warnings.filterwarnings("ignore")
    if o.peak_of:
        print(peak_here(o, Setting(*o.peak_of)))
        return
    keep_freed_memory()  # not with the variables of the processes that measure memory
    wanted = settings(o)
    every = list(dict.fromkeys(setting for points in wanted.values() for setting in points))
    seconds: dict[Setting, list[float]] = {setting: [] for setting in every}
    for setting, passed in times(o, every) if o.rounds else ():
        seconds[setting].append(passed)
    megabytes = dict.fromkeys(every, math.nan)
    if not o.no_memory:
        with ThreadPoolExecutor(o.jobs) as pool:
            megabytes = dict(zip(every, pool.map(peak, every), strict=True))
    found: dict[str, dict[str, dict[int, tuple[float, float]]]] = {}
    for axis, points in wanted.items():
        found[axis] = {}
        print(f"\n| {axis} | " + " | ".join(f"{m}, s | {m}, MB" for m in METHODS) + " |\n|--:" + "|--:" * 4 + "|")
        for setting in points:
            figures = (median(seconds[setting] or [math.nan]), megabytes[setting])
            found[axis].setdefault(setting.method, {})[getattr(setting, axis)] = figures
        for value in getattr(o, axis):
            cells = [found[axis].get(method, {}).get(value) for method in METHODS]
            print(f"| {value} | " + " | ".join(f"{c[0]:.3f} | {c[1]:.0f}" if c else " | " for c in cells) + " |")
        for method, curve in found[axis].items():
            seconds_of, megabytes_of = ({x: y[i] for x, y in curve.items()} for i in range(2))
            if axis == "hops":
                hop = linear_regression(list(seconds_of), list(seconds_of.values())).slope if len(curve) > 1 else 0.0
                print(f"\n{method}: {hop:.3f} s for each hop, straight line", flush=True)
                continue
            low, high = o.ends.get(axis, (min(curve), max(curve)))
            both = [slope(values, (low, high)) for values in (seconds_of, megabytes_of)]
            print(f"\nslope of {method} from {low} to {high}: time {both[0]:.2f}, memory {both[1]:.2f}", flush=True)
    if o.figure:
        draw(found, o.figure)


if __name__ == "__main__":
    main()
