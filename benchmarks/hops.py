"""What does a hop cost, and what does it bring on the bundled task?

For each number of hops: seconds for a training step (median, the settings interleaved in one run), and the validation
reward, KL and share of positive completions after `steps` steps, mean and standard deviation over seeds.

python benchmarks/hops.py --steps 300 --seeds 1 2 3
"""

import argparse
import logging
import statistics
import time
import warnings
from typing import Literal

import torch
from lightning.pytorch import Trainer, seed_everything

from grade_lightning import bundled
from grade_lightning.data import TextDataModule
from grade_lightning.data.reviews import grammar_positive
from grade_lightning.methods import GradeSTE
from grade_lightning.records import Batching
from grade_lightning.rewards import FunctionReward

Hops = int | Literal["exact"]


def number(text: str) -> Hops:
    """Of hops, as an option says it."""
    return "exact" if text == "exact" else int(text)


def seconds(asked: list[Hops], repeats: int) -> dict[Hops, float]:
    """Median seconds for sampling, loss and backward pass."""
    methods = {hops: GradeSTE(hops=hops) for hops in asked}
    for method in methods.values():
        method.configure_model()
    data = TextDataModule()
    data.attach(next(iter(methods.values())).tokenizer, Batching())
    data.setup()
    times: dict[Hops, list[float]] = {hops: [] for hops in asked}
    for _, batch in zip(range(repeats), data.train_dataloader(), strict=False):
        for hops, method in methods.items():
            began = time.perf_counter()
            method.training_step(batch, 0).backward()
            times[hops].append(time.perf_counter() - began)
    return {hops: statistics.median(values[1:]) for hops, values in times.items()}


def train(hops: Hops, steps: int, seed: int) -> dict[str, float]:
    """Validation after training."""
    seed_everything(seed, verbose=False)
    method = GradeSTE(hops=hops, judges=[FunctionReward(grammar_positive)])
    trainer = Trainer(
        max_steps=steps,
        limit_val_batches=4,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    data = TextDataModule()
    trainer.fit(method, data)
    (metrics,) = trainer.validate(method, data, verbose=False)
    return {name: metrics[f"val/{name}"] for name in ("reward", "kl", "rewards/grammar_positive")}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hops", type=number, nargs="+", default=[0, 1, 2, 4, "exact"])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    bundled.prepare()
    torch.manual_seed(0)
    cost = seconds(args.hops, args.repeats)
    print("| hops | seconds per step | relative | reward | KL | positive |\n|---|--:|--:|--:|--:|--:|")
    for hops in args.hops:
        runs = [train(hops, args.steps, seed) for seed in args.seeds]
        cells = []
        for name in runs[0]:
            values = [run[name] for run in runs]
            cells.append(f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}")
        relative = cost[hops] / cost[args.hops[0]]
        print(f"| {hops} | {cost[hops]:.3f} | {relative:.2f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
