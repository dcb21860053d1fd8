"""How far is each estimate of the gradient from the true one: how much of it is bias, how much noise?

Random problems so small that all completions can be enumerated: a GPT-2 of two layers, one prompt, a random nonlinear
reward, no KL. Their exact gradient is compared with independent estimates of every method at the same parameters, each
made of the same number of completions. All methods are given the same completions (but for the soft ones of Grade), so
rows differ by less than their intervals suggest; those (95 %) are over the problems. GRPO and PPO divide by the spread
of the rewards or advantages: most of their relative bias is a matter of length, which a learning rate makes up for.

python benchmarks/estimators.py --figure docs/figures/estimators.png --csv docs/figures/estimators.csv > estimators.md
"""

import argparse
import csv
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from torch.nn.utils import parameters_to_vector
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from grade_lightning.advantages import Baseline
from grade_lightning.estimators import Gumbel, ReinMax, ReinMaxRao, StraightThrough
from grade_lightning.functional.gradient_quality import Alignment, alignment
from grade_lightning.functional.intervals import Interval, jackknife
from grade_lightning.functional.moments import gram
from grade_lightning.functional.sequences import completion_mask, entropy, masked_sum, token_logps
from grade_lightning.kl import KL
from grade_lightning.methods import GRPO, PPO, RLOO, Grade, GradeSTE, Reinforce
from grade_lightning.modules import AlignmentModule, PolicyGradientModule
from grade_lightning.numerics import hash_seed
from grade_lightning.policies import Policy
from grade_lightning.records import Rollout
from grade_lightning.rewards import DifferentiableReward
from grade_lightning.rollouts import Sampler
from grade_lightning.schedules import Constant

EOS, PROMPT, WIDTH = 0, 3, 16
TAUS = (0.5, 1.0, 2.0)
HOPS = (0, 1, 2, 4)
TOKENS = {
    "Gumbel": Gumbel(),
    "Gumbel-Rao": Gumbel(draws=8),
    "StraightThrough": StraightThrough(),
    "ReinMax": ReinMax(),
    "ReinMax-Rao": ReinMaxRao(),
}
QUANTITIES = ("relative_bias", "cosine", "relative_std", "cosine_of_one", "scaled_error")
# of Okabe and Ito, a grey and a wine red
COLORS = ("#000000", "#999999", "#F0E442", "#CC79A7", "#E69F00", "#56B4E9", "#0072B2", "#D55E00", "#882255", "#009E73")
MARKERS = "XPspv^Dho*"


class RandomReward(DifferentiableReward):
    """Two layers of tanh over all tokens and their positions."""

    def __init__(self, vocabulary: int, length: int, gain: float) -> None:
        super().__init__()
        self.first = torch.randn(length, vocabulary, WIDTH, dtype=torch.float64) * gain / math.sqrt(length)
        self.second = torch.randn(WIDTH, WIDTH, dtype=torch.float64) * gain / math.sqrt(WIDTH)
        self.last = torch.randn(WIDTH, dtype=torch.float64)

    def table(self) -> Tensor:
        """One-hot tokens."""
        return torch.eye(self.first.shape[1], dtype=torch.float64)

    def score_embeddings(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """Scores of one-hot or soft tokens."""
        kept = embeddings * mask.unsqueeze(-1)
        hidden = torch.einsum("blv,lvw->bw", kept, self.first[: mask.shape[1]]).tanh()
        return (hidden @ self.second).tanh() @ self.last


class Problem:
    """A policy and a reward, scaled so that the exact gradient has length 1: every problem counts alike.

    Args:
        vocabulary: tokens, the end of a completion included.
        length: of the longest completions.
        scale: of the policy's weights; larger: less entropy.
        gain: of the reward's weights; larger: further from linear.
        seed: decides all of it, and every draw.
    """

    def __init__(self, vocabulary: int, length: int, scale: float, gain: float, seed: int) -> None:
        torch.manual_seed(seed)
        self.length, self.seed = length, seed
        config = GPT2Config(n_embd=WIDTH, n_head=2, n_layer=2, n_positions=PROMPT + length, tie_word_embeddings=False)
        config.vocab_size = vocabulary
        config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
        config.bos_token_id = config.eos_token_id = EOS
        model = GPT2LMHeadModel(config).double()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(scale)
            model.transformer.wte.weight.normal_(std=2.0)  # else prompt and position count for more than earlier tokens
        inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w1"))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="w0", pad_token="w0")
        self.policy = Policy.from_model(model, tokenizer)
        self.parameters = list(model.parameters())
        self.prompt = torch.randint(1, vocabulary, (1, PROMPT))
        self.reward = RandomReward(vocabulary, PROMPT + length, gain)
        value, self.entropy, gradient = self.enumerate(vocabulary)
        norm = gradient.norm()
        self.reward.last /= norm
        self.value, self.truth = float(value / norm), gradient / norm

    def enumerate(self, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
        """Expected reward, entropy of a completion in nats, and gradient of the former, over all completions."""
        every = torch.cartesian_prod(*[torch.arange(vocabulary)] * self.length).view(-1, self.length)
        every = every.masked_fill(~completion_mask(every, [EOS]), EOS).unique(dim=0)
        mass, total, nats, gradient = (torch.zeros((), dtype=torch.float64) for _ in range(4))
        for tokens in every.split(4096):
            mask, prompt = completion_mask(tokens, [EOS]), self.prompt.expand(len(tokens), -1)
            unused = torch.zeros(tokens.shape)
            rollout = Rollout(prompt, torch.ones_like(prompt), tokens, mask, unused, self.policy.tokenizer)
            logits = self.policy(self.policy.embed(rollout.ids[:, :-1]), rollout.mask[:, :-1], self.length)
            logps = logits.log_softmax(-1)
            probs = masked_sum(token_logps(logps, tokens), mask).exp()
            value = (probs * self.reward(rollout)).sum()
            gradient = gradient + self.gradient(value)
            mass, total = mass + probs.detach().sum(), total + value.detach()
            nats = nats + (probs * masked_sum(entropy(logps), mask)).detach().sum()
        if abs(float(mass) - 1) > 1e-9:
            raise RuntimeError(f"the probabilities of all {len(every)} completions add up to {float(mass)}")
        return total, nats, gradient

    def gradient(self, value: Tensor) -> Tensor:
        """At the policy's parameters, (d,)."""
        return parameters_to_vector(torch.autograd.grad(value, self.parameters, materialize_grads=True))

    def compare(self, make: Callable[..., AlignmentModule], samples: int, draws: int) -> Alignment:
        """A method beside the truth, by `draws` estimates of `samples` completions each."""
        module = make(policy=self.policy, reward=self.reward, sampler=Sampler(max_new_tokens=self.length))
        module.configure_model()
        rows = samples
        if isinstance(module, PolicyGradientModule):
            rows = samples // module.num_generations
            if isinstance(module.advantage, Baseline):
                module.advantage.average = self.value
        prompts = self.prompt.expand(rows, -1)
        estimates = []
        for draw in range(draws):
            torch.manual_seed(hash_seed(self.seed, draw))
            loss = module.draw_loss({"input_ids": prompts, "attention_mask": torch.ones_like(prompts)})
            estimates.append(self.gradient(-loss))
        found, truth = torch.stack(estimates), self.truth.expand(2, -1)
        return alignment(gram(found), found @ truth.T, gram(truth))


class Estimator(NamedTuple):
    """A method and its settings, at one length of the completions."""

    length: int
    name: str
    make: Callable[..., AlignmentModule]
    tau: float | None = None
    hops: int | Literal["exact"] | None = None

    def cells(self) -> list[str]:
        """Name, τ and hops."""
        tau = "" if self.tau is None else f"{self.tau:g}"
        return [self.name, tau, "" if self.hops is None else str(self.hops)]


Results = dict[Estimator, dict[str, Interval]]


def estimators(length: int, samples: int) -> Iterator[Estimator]:
    """All that are compared."""
    yield Estimator(length, "Reinforce", partial(Reinforce, kl=KL()))
    yield Estimator(length, "RLOO", partial(RLOO, num_generations=samples, kl=KL()))
    yield Estimator(length, "PPO", partial(PPO, trunk="detached", epochs=1, kl=KL()))
    yield Estimator(length, "GRPO", partial(GRPO, num_generations=samples, kl=KL()))
    for tau in TAUS:
        make = partial(Grade, top_k=None, tau=Constant(tau), beta=0.0, block=length)
        yield Estimator(length, "Grade", make, tau)
    for name, token in TOKENS.items():
        method = partial(GradeSTE, estimator=token, beta=0.0)
        for tau in TAUS:
            yield Estimator(length, name, partial(method, tau=Constant(tau), hops="exact"), tau, "exact")
        for hops in HOPS if name in ("Gumbel", "StraightThrough") else ():
            if hops < length - 1:  # else exact
                yield Estimator(length, name, partial(method, hops=hops), 1.0, hops)


def interval(problems: Alignment, quantity: str) -> Interval:
    """One quantity over the problems. An unbiased squared bias below 0 gives a relative bias below 0."""
    name = "squared_bias" if quantity == "relative_bias" else quantity
    count = len(problems.reference)
    found = jackknife(lambda rows: getattr(Alignment(*(x[rows] for x in problems)), name), count)
    return Interval(*(x.sign() * x.abs().sqrt() for x in found)) if quantity == "relative_bias" else found


def measure(o: argparse.Namespace) -> Results:
    """Each estimator at each length."""
    results: Results = {}
    for length in o.lengths:
        seeds = [hash_seed(o.seed, length, i) for i in range(o.problems)]
        problems = [Problem(o.vocabulary, length, o.scale, o.gain, seed) for seed in seeds]
        nats = sum(float(problem.entropy) for problem in problems) / o.problems
        print(f"length {length}: {nats:.2f} nats a completion", file=sys.stderr)
        for estimator in estimators(length, o.samples):
            began = time.perf_counter()
            compared = [problem.compare(estimator.make, o.samples, o.draws) for problem in problems]
            stacked = Alignment(*(torch.stack(values) for values in zip(*compared, strict=True)))
            results[estimator] = {quantity: interval(stacked, quantity) for quantity in QUANTITIES}
            seconds = time.perf_counter() - began
            print(f"length {length}: {' '.join(estimator.cells())} ({seconds:.0f} s)", file=sys.stderr)
    return results


def table(results: Results, length: int) -> Iterator[str]:
    """Lines of Markdown; a bias that is not resolved from 0 with the upper end of its interval."""
    yield f"| estimator | τ | hops | {' | '.join(QUANTITIES).replace('_', ' ')} |"
    yield "|---|--:|--:" + "|--:" * len(QUANTITIES) + "|"
    for estimator, found in results.items():
        if estimator.length == length:
            cells = estimator.cells()
            for quantity, (estimate, low, high) in found.items():
                value = f"{estimate:.2f}" if estimate > 0 or quantity != "relative_bias" else "0"
                unresolved = quantity == "relative_bias" and low <= 0
                cells.append(f"{value} (≤ {high:.2f})" if unresolved else f"{value} ± {(high - low) / 2:.2f}")
            yield f"| {' | '.join(cells)} |"


def write(results: Results, path: Path) -> None:
    """A line for each number."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["length", "estimator", "tau", "hops", "quantity", "estimate", "low", "high"])
        for estimator, found in results.items():
            for quantity, ends in found.items():
                writer.writerow([estimator.length, *estimator.cells(), quantity, *(f"{x:.6g}" for x in ends)])


def draw(results: Results, at: int, path: Path) -> None:
    """Bias against noise at one length, and what one estimate is worth at each."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    names = list(dict.fromkeys(estimator.name for estimator in results))
    for index, (name, color, marker) in enumerate(zip(names, COLORS, MARKERS, strict=True)):
        rows = {e: found for e, found in results.items() if e.name == name and e.hops in (None, "exact")}
        here = {e: found for e, found in rows.items() if e.length == at}
        ours = {e.length: found["cosine_of_one"] for e, found in rows.items() if e.tau in (None, 1.0)}
        noise = [float(found["relative_std"].estimate) for found in here.values()]
        shifted = [length + 0.06 * (index - len(names) // 2) for length in ours]
        bias = torch.tensor([[max(float(x), 0.0) for x in found["relative_bias"]] for found in here.values()])
        value = torch.tensor([[float(x) for x in found] for found in ours.values()])
        areas = [60 * (e.tau or 1.0) for e in here]
        for axes, x, ends, size in ((left, noise, bias, areas), (right, shifted, value, [60.0] * len(ours))):
            estimate, low, high = ends.T
            axes.errorbar(x, estimate, [estimate - low, high - estimate], color=color, linewidth=1, elinewidth=0.8)
            axes.scatter(x, estimate, size, color, marker, edgecolor="black", linewidth=0.6, zorder=3, label=name)
    left.set(xscale="log", xlabel="relative standard deviation of one estimate, √tr Σ / |G|", ylim=(-0.04, None))
    left.set(ylabel="relative bias, |G − R| / |R|", title=f"at most {at} tokens; size: τ = 0.5, 1, 2")
    left.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.xaxis.set_major_formatter(ScalarFormatter())
    left.xaxis.set_minor_formatter(NullFormatter())
    right.set(xlabel="longest completion, tokens", ylabel="expected cosine of one estimate to the truth", title="τ = 1")
    right.set_xticks(sorted({e.length for e in results}))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=6)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2, 4, 6], help="of the longest completions, tokens")
    parser.add_argument("--problems", type=int, default=24, help="random policies and rewards for each length")
    parser.add_argument("--samples", type=int, default=8, help="completions in each estimate")
    parser.add_argument("--draws", type=int, default=50, help="estimates for each problem; problems differ by more")
    parser.add_argument("--scale", type=float, default=18.0, help="of the policy's weights; larger: less entropy")
    parser.add_argument("--gain", type=float, default=1.0, help="of the reward's weights; larger: further from linear")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path, help="where to write the numbers")
    parser.add_argument("--figure", type=Path, help="where to draw bias against noise")
    parser.add_argument("--at", type=int, help="length whose bias and noise are drawn; the middle one by default")
    o = parser.parse_args()
    results = measure(o)
    settings = {name: value for name, value in vars(o).items() if name not in ("csv", "figure", "at")}
    print(f"`{shlex.join(['python', *sys.argv])}`: " + ", ".join(f"{k} {v}" for k, v in settings.items()))
    for length in o.lengths:
        print(f"\nAt most {length} tokens:\n", *table(results, length), sep="\n")
    if o.csv:
        write(results, o.csv)
    if o.figure:
        draw(results, o.at or sorted(o.lengths)[len(o.lengths) // 2], o.figure)


if __name__ == "__main__":
    main()
