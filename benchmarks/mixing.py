"""What would a mix of GradeSTE's gradient and an unbiased one gain, and for how many completions?

At one policy, without any step: GradeSTE's gradient, calibrated, and the policy gradient with pathwise credit are taken
of the same batches, a prompt with its completions at a time (`Mixed`). From their variances, their covariance and the
squared bias follow, for any number of completions, the best weight λ of the biased one and the expected squared errors,
over the squared length |G|² of the true gradient; cosine and length are of GradeSTE's gradient times the slope. The
first batches only teach the credit. Intervals (95 %) leave out one batch at a time. No KL.

On text: python benchmarks/mixing.py --policy MODEL --reward REWARD --train imdb_train.parquet --test imdb_test.parquet
In the laboratory of credit.py: python benchmarks/mixing.py --length 8
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import Prompts as RandomPrompts
from common import note
from credit import VOCABULARY, laboratory, reviews
from torch import Tensor

from grade_lightning.blends import Mixed
from grade_lightning.functional.intervals import jackknife
from grade_lightning.functional.mixing import Errors, errors, mix_weight
from grade_lightning.methods import GradeSTE
from grade_lightning.numerics import hash_seed
from grade_lightning.records import Experience
from grade_lightning.rewards import ClassifierReward, DifferentiableReward
from grade_lightning.rollouts import Sampler


class Kept(Mixed):
    """Keeps the products of all gradients."""

    def __init__(self, parts: int) -> None:
        super().__init__(every=1, parts=parts)
        self.products: list[Tensor] = []
        self.learning = True

    def due(self, step: int) -> bool:
        """Once it has learned."""
        return not self.learning

    def compare(self, products: Tensor) -> None:
        """Keep them."""
        self.products.append(products)


def observed(module: GradeSTE, batch: dict[str, Any]) -> None:
    """A batch as in training, without a step."""
    with module.collecting():
        seen = module.collect(batch)
    step = module.loss(seen)
    module.observe(Experience(seen.rollout, seen.scores, seen.beta, old=step.stats.detach()))


def figures(products: Tensor, completions: int, size: int) -> Tensor:
    """Of batches (n, 2p, 2p): cosine, length, and for `size` completions λ and the errors of S, U and the mix."""
    parts = products.shape[-1] // 2
    blocks = [products[:, :parts, :parts], products[:, :parts, parts:], products[:, parts:, parts:]]
    crossed = [(x.sum((1, 2)) - x.diagonal(dim1=1, dim2=2).sum(1)).mean() / (parts * (parts - 1)) for x in blocks]
    found = torch.stack([torch.stack(errors(*(x[i] for x in blocks))) for i in range(len(products))]).mean(0)
    scale = completions / size
    now = Errors(found[0] * scale, found[1] * scale, found[2] * scale, found[3])
    weight, bias = mix_weight(now), now.bias.clamp(min=0)
    mixed = weight**2 * (now.biased + bias) + (1 - weight) ** 2 * now.unbiased + 2 * weight * (1 - weight) * now.shared
    cosine = crossed[1] / (crossed[0] * crossed[2]).sqrt()
    wrong = torch.stack([now.biased + bias, now.unbiased, mixed]) / crossed[2]
    return torch.cat([torch.stack([cosine, (crossed[0] / crossed[2]).sqrt(), weight]), wrong])


def measured(module: GradeSTE, batches: Iterator[dict[str, Any]], learn: int, count: int) -> tuple[Tensor, Tensor]:
    """Products of all gradients of `count` batches, (count, 2p, 2p); the slope and its r² after `learn` others."""
    blend = module.blend
    assert isinstance(blend, Kept)
    module.configure_model()
    for i in range(learn + count):
        blend.learning = i < learn
        observed(module, next(batches))
        note(f"batch {i + 1} of {learn + count}")
    return torch.stack(blend.products), torch.stack(list(blend.credit.fitted().values()))


def show(products: Tensor, fitted: Tensor, completions: int, sizes: list[int]) -> None:
    """A line for each number of completions."""
    start = f"| {float(fitted[0]):.2f} | {float(fitted[1]):.2f}"
    for size in sizes:
        found = jackknife(lambda rows, size=size: figures(products[rows], completions, size), len(products))
        cells = [f"{e:.2f} ({a:.2f} … {b:.2f})" for e, a, b in zip(*(x.tolist() for x in found), strict=True)]
        print(f"{start} | {size} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("policy", "reward", "train", "test"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--prompts", type=int, default=8, help="of a batch")
    parser.add_argument("--generations", type=int, default=4, help="completions of each prompt")
    parser.add_argument("--length", type=int, default=32, help="tokens of a completion at most")
    parser.add_argument("--learn", type=int, default=40, help="batches from which the credit learns before")
    parser.add_argument("--batches", type=int, default=40, help="that are compared")
    parser.add_argument("--problems", type=int, default=6, help="of the laboratory")
    parser.add_argument("--scale", type=float, default=0.5, help="of the laboratory's rewards")
    parser.add_argument("--hops", type=int, default=2)
    parser.add_argument("--sizes", type=int, nargs="*", default=[16, 64, 256, 1024, 4096])
    parser.add_argument("--seed", type=int, default=1)
    o = parser.parse_args()
    completions = o.prompts * o.generations
    print("| slope | r² | completions | cosine | length | λ | error of GradeSTE | of the unbiased one | of the mix |")
    print("|--:|--:|--:|--:|--:|--:|--:|--:|--:|")

    def method(policy: Any, reward: DifferentiableReward) -> GradeSTE:
        settings: dict[str, Any] = {"beta": 0.0, "hops": o.hops, "num_generations": o.generations}
        return GradeSTE(policy, reward, sampler=Sampler(o.length), blend=Kept(o.prompts), **settings)

    if o.policy is None:
        for seed in range(o.problems):
            module = method(*laboratory(o.length, o.scale, seed))
            torch.manual_seed(hash_seed(o.seed, seed))
            rows = iter(RandomPrompts(o.prompts, VOCABULARY, length=4))
            show(*measured(module, rows, o.learn, o.batches), completions, o.sizes)
        return
    torch.manual_seed(o.seed)
    module = method(str(o.policy), ClassifierReward(str(o.reward)))
    module.configure_model()
    batches = reviews(o.train, o.test, module.policy, o.prompts)
    show(*measured(module, batches, o.learn, o.batches), completions, o.sizes)


if __name__ == "__main__":
    main()
