"""How noisy, and how biased, is one step's gradient of each method, on real text at the same parameters?

Sets of prompts are held, and so are the policy's parameters; every method draws the same number of completions of
them, again and again, with β = 0. The reference is the mean of RLOO over many times as many completions, in independent
parts, so that its own noise can be taken off. All ratios are ratios of averages over the sets of prompts; intervals
leave out one set at a time. Finished parts are kept in OUT and not repeated.

python benchmarks/variance.py OUT --policy MODEL --reward REWARD --train imdb_train.parquet --test imdb_test.parquet
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import note
from safetensors.torch import load_file, save_file
from torch import Tensor

from grade_lightning.advantages import Baseline
from grade_lightning.data import LocalFiles, TextDataModule
from grade_lightning.estimators import Gumbel, ReinMax, StraightThrough
from grade_lightning.functional.gradient_quality import Alignment, alignment
from grade_lightning.functional.intervals import jackknife, ratio_interval
from grade_lightning.functional.moments import gram
from grade_lightning.kl import KL
from grade_lightning.methods import GRPO, PPO, RLOO, Grade, GradeSTE, Reinforce
from grade_lightning.modules import AlignmentModule, PolicyGradientModule
from grade_lightning.numerics import hash_seed
from grade_lightning.policies import Policy
from grade_lightning.records import Batching, Prompts, slice_rows
from grade_lightning.rewards import ClassifierReward
from grade_lightning.rollouts import Sampler
from grade_lightning.schedules import Constant

COLUMNS = {
    "relative_std": r"noise √tr Σ / \|G\|",
    "snr": "SNR",
    "cosine": "cosine of the mean",
    "cosine_of_one": "cosine of one",
    "scaled_error": "error, best scale",
    "length": r"\|G\| / \|R\|",
}
Make = Callable[..., AlignmentModule]
QUANTITIES: dict[str, Callable[[Alignment], Tensor]] = {
    "cosine": lambda a: a.cosine,
    "cosine_of_one": lambda a: a.cosine_of_one,
    "scaled_error": lambda a: a.scaled_error,
}


def estimators(generations: int) -> dict[str, tuple[Make, dict[str, Any]]]:
    """Every estimator by its name: the module's class and its arguments."""
    table: dict[str, tuple[Make, dict[str, Any]]] = {
        "Reinforce": (Reinforce, {"num_generations": generations, "kl": KL(0.0)}),
        "RLOO": (RLOO, {"num_generations": generations, "kl": KL(0.0)}),
        "PPO, first step": (PPO, {"num_generations": generations, "kl": KL(0.0), "trunk": "detached"}),
        "GRPO": (GRPO, {"num_generations": generations, "kl": KL(0.0)}),
    }
    for tau in (0.5, 1.0, 2.0):
        settings = {"beta": 0.0, "tau": Constant(tau)}
        for hops in (0, 1, 4, "exact"):
            name = f"GradeSTE, Gumbel, τ = {tau:g}, hops {hops}"
            table[name] = (GradeSTE, settings | {"estimator": Gumbel(), "hops": hops})
        table[f"Grade (soft), τ = {tau:g}"] = (Grade, settings | {"top_k": None, "block": 1000})
    settings = {"beta": 0.0, "tau": Constant(1.0), "hops": 4}
    for name, estimator in {
        "straight-through": StraightThrough(),
        "Gumbel-Rao, 8 draws": Gumbel(draws=8),
        "ReinMax": ReinMax(),
    }.items():
        table[f"GradeSTE, {name}, τ = 1, hops 4"] = (GradeSTE, settings | {"estimator": estimator})
    return table


class Bench:
    """The policy, the reward and the sets of prompts that all estimators share."""

    def __init__(self, o: argparse.Namespace) -> None:
        self.o, self.out = o, o.out
        self.out.mkdir(parents=True, exist_ok=True)
        self.policy, self.reward = Policy(str(o.policy)), ClassifierReward(str(o.reward))
        self.sampler = Sampler(max_new_tokens=o.length)
        self.policy.load()
        data = TextDataModule(
            LocalFiles(str(o.train), str(o.test)), batch_size=o.sets * o.prompts, max_prompt_tokens=32
        )
        data.prepare_data()
        data.attach(self.policy.tokenizer, Batching())
        data.setup()
        batch = next(iter(data.train_dataloader()))
        self.sets = [slice_rows(batch, i * o.prompts, o.prompts) for i in range(o.sets)]

    def module(self, make: Make, **settings: Any) -> AlignmentModule:
        """A method on the shared policy."""
        module = make(policy=self.policy, reward=self.reward, sampler=self.sampler, **settings)
        module.configure_model()
        return module.train()

    def draw(self, module: AlignmentModule, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """One gradient of the objective, (d,), and the norms of its tensors."""
        parameters = [p for p in self.policy.parameters() if p.requires_grad]
        found = torch.autograd.grad(-module.draw_loss(batch), parameters)
        return torch.cat([g.flatten() for g in found]), torch.stack([g.norm() for g in found])

    def references(self) -> list[Tensor]:
        """Of each set, independent means of RLOO's gradient, (parts, d)."""
        o, found = self.o, []
        module = self.module(RLOO, num_generations=o.generations, kl=KL(0.0))
        for i, batch in enumerate(self.sets):
            file = self.out / f"reference-{i}.safetensors"
            if not file.is_file():
                began, rewards, means = time.perf_counter(), [], []
                for part in range(o.parts):
                    torch.manual_seed(hash_seed(o.seed, i, part))
                    total = torch.zeros(())
                    for _ in range(o.repeats):
                        experience = module.collect(batch)
                        rewards.append(experience.scores.total)
                        loss = module.loss(experience).loss
                        gradient = torch.autograd.grad(-loss, [p for p in self.policy.parameters() if p.requires_grad])
                        total = total + torch.cat([g.flatten() for g in gradient]) / o.repeats
                    means.append(total)
                note(f"reference of set {i + 1} of {o.sets}: {time.perf_counter() - began:.0f} s")
                save_file({"gradients": torch.stack(means), "rewards": torch.cat(rewards)}, file)
            found.append(load_file(file)["gradients"])
        return found

    def baseline(self) -> float:
        """Mean reward of the reference's completions: what a long average of the rewards would be."""
        files = sorted(self.out.glob("reference-*.safetensors"))
        return float(torch.cat([load_file(file)["rewards"] for file in files]).mean())

    def measure(self, make: Make, settings: dict[str, Any], references: list[Tensor], draws: int) -> dict[str, Any]:
        """Draw, and compare with the references."""
        o, began, parts = self.o, time.perf_counter(), []
        module = self.module(make, **settings)
        if isinstance(module, PolicyGradientModule) and isinstance(module.advantage, Baseline):
            module.advantage.average = self.baseline()
        spread: list[Tensor] = []
        for i, (batch, reference) in enumerate(zip(self.sets, references, strict=True)):
            torch.manual_seed(hash_seed(o.seed, i, "draw"))
            rows = batch if "num_generations" in settings else repeated(batch, o.completions)
            drawn = [self.draw(module, rows) for _ in range(draws)]
            gradients = torch.stack([gradient for gradient, _ in drawn])
            spread += [torch.stack([norms.std(unbiased=False), norms.mean()]) for _, norms in drawn]
            parts.append(alignment(gram(gradients), gradients.double() @ reference.double().mT, gram(reference)))
        found = Alignment(*(torch.stack([getattr(part, name) for part in parts]) for name in Alignment._fields))

        def statistics(rows: Tensor) -> Tensor:
            some = Alignment(*(values[rows] for values in found))
            return torch.stack([quantity(some) for quantity in QUANTITIES.values()])

        across, mean = torch.stack(spread).mean(0).tolist()
        noise = ratio_interval(found.trace, found.squared_norm)
        length = ratio_interval(found.squared_norm, found.reference)
        jackknifed = zip(QUANTITIES, torch.stack(list(jackknife(statistics, len(parts)))).mT, strict=True)
        intervals = {
            "relative_std": torch.stack(list(noise)).sqrt(),
            "snr": 1 / torch.stack([noise.estimate, noise.high, noise.low]),
            "length": torch.stack(list(length)).sqrt(),
            **dict(jackknifed),
        }
        return {
            "seconds": (time.perf_counter() - began) / draws / len(parts),
            "draws": draws,
            "across_tensor_std": across,
            "across_tensor_mean": mean,
            "norm_of_one": float((found.squared_norm + found.trace).mean().sqrt()),
            "sets": {name: getattr(found, name).tolist() for name in Alignment._fields},
            **{name: ends.tolist() for name, ends in intervals.items()},
        }


def repeated(batch: dict[str, Any], times: int) -> dict[str, Any]:
    """A batch with each prompt so often in a row."""
    prompts = Prompts.of(batch)
    prompts = prompts.repeat(torch.full((len(prompts),), times))
    return {"input_ids": prompts.ids, "attention_mask": prompts.mask, "columns": prompts.columns}


def draw(folders: list[Path], path: Path) -> None:
    """Noise, bias and the published figure of every estimator; one colour for each folder."""
    import matplotlib.pyplot as plt

    found = [{name: file_of(folder, name) for name in estimators(1)} for folder in folders]
    names = [name for name in estimators(1) if all(files[name].is_file() for files in found)][::-1]
    figure, axes = plt.subplots(1, 3, figsize=(13, 0.28 * len(names) + 1.5), sharey=True, layout="constrained")
    for index, (folder, files) in enumerate(zip(folders, found, strict=True)):
        runs = [json.loads(files[name].read_text()) for name in names]
        rows = torch.arange(len(names)) + 0.18 * (1 - 2 * index)
        style = {"color": ("#0072B2", "#E69F00", "#009E73")[index % 3], "label": folder.name}
        for axis, quantity in zip(axes, ("relative_std", "cosine"), strict=False):
            middle, low, high = torch.tensor([run[quantity] for run in runs], dtype=torch.float64).T
            top = high.where(high.isfinite(), 3 * middle)
            axis.hlines(rows, low.clamp(min=1e-2 if quantity == "relative_std" else 0), top, alpha=0.6, **style)
            axis.plot(middle, rows, "o", markersize=4, color=style["color"])
        axes[2].plot([run["across_tensor_std"] for run in runs], rows, "o", markersize=4, **style)
    axes[0].set(xscale="log", xlabel="noise √tr Σ / |G| of one estimate", yticks=range(len(names)), yticklabels=names)
    axes[1].set(xlim=(0, 1.15), xlabel="cosine of its mean to the true gradient")
    axes[1].axvline(1, color="black", linewidth=0.5)
    axes[2].set(xscale="log", xlabel="published: std of norms across tensors")
    axes[2].legend(loc="lower right")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def file_of(folder: Path, name: str) -> Path:
    """Where the figures of an estimator are kept."""
    return folder / f"{name.replace(' ', '').replace('=', '')}.json"


def interval(middle: float, low: float, high: float) -> str:
    """A ratio with its interval; ∞ has no upper end, ? is not resolved."""
    return f"{_short(middle)} ({_short(low)} … {_short(high)})"


def _short(x: float) -> str:
    return "?" if math.isnan(x) else "∞" if math.isinf(x) else f"{x:.2g}" if abs(x) < 10 else f"{x:.0f}"


def centred(middle: float, low: float, high: float, digits: int = 2) -> str:
    """A figure and half its interval."""
    return "–" if math.isnan(middle) else f"{middle:.{digits}f} ± {(high - low) / 2:.{digits}f}"


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    for name in ("policy", "reward", "train", "test"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--sets", type=int, default=8, help="sets of prompts, the units of the intervals")
    parser.add_argument("--prompts", type=int, default=4, help="of a set")
    parser.add_argument("--completions", type=int, default=4, help="of each prompt in one estimate")
    parser.add_argument("--length", type=int, default=48, help="tokens of a completion at most")
    parser.add_argument(
        "--draws",
        type=int,
        default=8,
        help="estimates of each set; three times as many of the noisy, three with exact hops",
    )
    parser.add_argument(
        "--generations", type=int, default=64, help="completions of a prompt in a pass of the reference"
    )
    parser.add_argument("--repeats", type=int, default=1, help="passes in each part of the reference")
    parser.add_argument("--parts", type=int, default=6, help="independent parts of the reference")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="estimators whose names contain this")
    parser.add_argument("--figure", type=Path, help="where to draw the results")
    parser.add_argument("--beside", type=Path, nargs="*", default=[], help="further OUT folders to draw")
    o = parser.parse_args()
    bench = Bench(o)
    references = bench.references()
    print("| estimator | " + " | ".join(COLUMNS.values()) + " | published |")
    print("|---" + "|--:" * (len(COLUMNS) + 1) + "|")
    for name, (make, settings) in estimators(o.completions).items():
        if o.only not in name:
            continue
        file = file_of(bench.out, name)
        if not file.is_file():
            draws = 3 if settings.get("hops") == "exact" else 3 * o.draws if "num_generations" in settings else o.draws
            file.write_text(json.dumps(bench.measure(make, settings, references, draws)))
        found = json.loads(file.read_text())
        cells = [(centred if q in QUANTITIES else interval)(*found[q]) for q in COLUMNS]
        cells[-2] = centred(*found["scaled_error"], digits=3)  # near 1
        cells.append(f"{found['across_tensor_std']:.3g}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    if o.figure:
        draw([o.out, *o.beside], o.figure)


if __name__ == "__main__":
    main()
