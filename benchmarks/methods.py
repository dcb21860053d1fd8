"""Which method raises the reward most for the same number of sampled tokens, and at what KL?

Every method is given the same objective, reward − β KL, and samples 120 times 16 completions. Its learning rate is
the one of the grid that is best by that objective on the validation prompts (seed 1); with it, it is run with the other
seeds, and the test prompts decide. Runs that are there already are not repeated: an interrupted comparison goes on.

python benchmarks/methods.py OUT --policy MODEL --reward REWARD --train imdb_train.parquet --test imdb_test.parquet
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

BETA = 0.003
STEPS = 120
GRID = (1e-4, 3e-4, 1e-3)
KL = ["--model.kl.beta", str(BETA)]
METHODS: dict[str, list[str]] = {
    "Reinforce": KL,
    "RLOO": KL,
    "PPO": [*KL, "--trainer.max_steps", str(4 * STEPS), "--trainer.val_check_interval", str(4 * STEPS)],  # four epochs
    # in the reward, so that its division by the group's standard deviation leaves the objective as it is
    "GRPO": [*KL, "--model.kl.estimator", "k1", "--model.kl.placement", "reward", "--model.kl.clock", "sequence"],
    "GradeSTE": [
        *("--model.beta", str(BETA), "--model.kl_prefix", "full"),
        *("--model.estimator", "Gumbel", "--model.estimator.draws", "4"),
    ],
    "Grade": ["--model.beta", str(BETA)],
}
CONFIG = Path(__file__).parents[1] / "configs" / "imdb_local.yaml"


class Comparison:
    """The runs, each in a folder of its own."""

    def __init__(self, out: Path, policy: Path, reward: Path, train: Path, test: Path, threads: int) -> None:
        self.out = out.resolve()
        self.environment = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        self.common = [
            *(
                "--config",
                str(CONFIG),
                "--data.source.train",
                str(train.resolve()),
                "--data.source.test",
                str(test.resolve()),
            ),
            *("--data.batch_size", "16", "--data.test_size", "512", "--model.policy.path", str(policy.resolve())),
            *("--model.reward", "ClassifierReward", "--model.reward.path", str(reward.resolve())),
            *("--trainer.max_steps", str(STEPS), "--trainer.val_check_interval", str(STEPS)),
            *("--trainer.enable_progress_bar", "false"),
        ]

    def command(self, name: str, folder: Path, *arguments: str) -> None:
        """Run a `grade-` command, its output in the folder; with this interpreter, so that any checkout can be used."""
        folder.mkdir(parents=True, exist_ok=True)
        code = f"import sys; sys.argv[0] = 'grade-{name}'; from grade_lightning_cli.main import {name}; {name}()"
        with open(folder / f"{name}.log", "w") as log:
            subprocess.run(
                [
                    sys.executable,
                    "-c",
                    code,
                    *arguments,
                    *self.common_of(arguments),
                    "--trainer.default_root_dir",
                    str(folder),
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
                check=True,
                env=os.environ | self.environment,
            )

    def common_of(self, arguments: tuple[str, ...]) -> list[str]:
        """Common arguments but those that are given: the last one counts."""
        given = {a for a in arguments if a.startswith("--")}
        pairs = zip(self.common[::2], self.common[1::2], strict=True)
        return [x for key, value in pairs if key not in given for x in (key, value)]

    def fit(self, method: str, lr: float, seed: int) -> dict[str, float]:
        """Validation figures at the end of a run."""
        folder = self.out / f"{method}-{lr:g}-{seed}"
        if not (folder / "fit.json").is_file():
            flags = ["--model.optimizer", "torch.optim.AdamW", "--model.optimizer.lr", str(lr)]
            flags += ["--seed_everything", str(seed)]
            self.command("fit", folder, "--model", method, *METHODS[method], *flags)
            (folder / "fit.json").write_text(json.dumps(_last(folder, "val")))
        found: dict[str, float] = json.loads((folder / "fit.json").read_text())
        return found

    def test(self, method: str, lr: float, seed: int) -> dict[str, float]:
        """Test figures of a run."""
        folder = self.out / f"{method}-{lr:g}-{seed}"
        if not (folder / "test.json").is_file():
            (checkpoint,) = folder.glob(f"{method}/version_*/checkpoints/*.ckpt")
            flags = ["--ckpt_path", str(checkpoint), "--seed_everything", str(seed)]
            self.command("test", folder, "--model", method, *METHODS[method], *flags)
            (folder / "test.json").write_text(json.dumps(_last(folder, "test")))
        found: dict[str, float] = json.loads((folder / "test.json").read_text())
        return found


def _last(folder: Path, stage: str) -> dict[str, float]:
    values: dict[str, float] = {}
    for file in sorted(folder.rglob("events.out.tfevents*")):
        events = EventAccumulator(str(file))
        events.Reload()
        for tag in events.Tags()["scalars"]:
            if tag.startswith(f"{stage}/"):
                values[tag.removeprefix(f"{stage}/")] = events.Scalars(tag)[-1].value
    return values


def _objective(found: dict[str, float]) -> float:
    return found["reward"] - BETA * found["kl"]


def rows(comparison: Comparison, methods: list[str], seeds: list[int], jobs: int) -> Iterator[str]:
    """A table, a line for each method."""
    yield (
        "| method | "
        + " | ".join(f"{lr:g}" for lr in GRID)
        + " | test reward | KL, nats | entropy | perplexity | distinct-2 |"
    )
    yield "|---" * (len(GRID) + 6) + "|"
    with ThreadPoolExecutor(jobs) as pool:
        grid = {m: [pool.submit(comparison.fit, m, lr, seeds[0]) for lr in GRID] for m in methods}
        chosen: dict[str, float] = {}
        tests = {}
        for m in methods:  # a method's seeds wait for its grid alone, and queue behind the grids of the others
            found = [_objective(run.result()) for run in grid[m]]
            chosen[m] = GRID[found.index(max(found))]
            fits = [pool.submit(comparison.fit, m, chosen[m], seed) for seed in seeds[1:]]
            tests[m] = (found, fits)
        for m, (found, fits) in tests.items():
            for fit in fits:
                fit.result()
            tested = list(pool.map(lambda seed, m=m: comparison.test(m, chosen[m], seed), seeds))
            cells = [f"**{x:.3f}**" if lr == chosen[m] else f"{x:.3f}" for lr, x in zip(GRID, found, strict=True)]
            for key, digits in (("reward", 3), ("kl", 1), ("entropy", 2), ("perplexity", 0), ("distinct_2", 3)):
                values = [run[key] for run in tested]
                cells.append(f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}")
            yield f"| {m} | " + " | ".join(cells) + " |"


def draw(out: Path, methods: list[str], path: Path) -> None:
    """Validation reward against KL at the end of every run, larger with the learning rate."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for method in methods:
        runs = [
            (float(f.parent.name.removeprefix(f"{method}-").rsplit("-", 1)[0]), json.loads(f.read_text()))
            for f in sorted(out.glob(f"{method}-*/fit.json"))
        ]
        sizes = [20 + 60 * GRID.index(lr) for lr, _ in runs]
        axes.scatter([run["kl"] for _, run in runs], [run["reward"] for _, run in runs], sizes, label=method, alpha=0.7)
    axes.set(xlabel="KL to the reference, nats per sequence", ylabel="reward (validation)")
    axes.legend(title="dot size: learning rate", fontsize="small")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Compare, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    for name in ("policy", "reward", "train", "test"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument("--figure", type=Path, help="where to draw reward against KL")
    o = parser.parse_args()
    comparison = Comparison(o.out, o.policy, o.reward, o.train, o.test, o.threads)
    for row in rows(comparison, o.methods, o.seeds, o.jobs):
        print(row, flush=True)
    if o.figure:
        draw(o.out, o.methods, o.figure)


if __name__ == "__main__":
    main()
