"""How far the expected update of each policy gradient is from the exact gradient of the expected reward.

All completions, and all batches of them with their probabilities, are enumerated: nothing here is sampled. Print the
table of docs/methods/unbiased.md with `python -m tests.methods.enumeration`.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from grade_lightning import methods
from grade_lightning.advantages import Baseline
from grade_lightning.columns import Columns
from grade_lightning.functional.aggregation import Normalizers
from grade_lightning.kl import KL
from grade_lightning.modules import PolicyGradientModule
from grade_lightning.records import Experience, Rollout, Scores, TokenStats
from grade_lightning.rollouts import Sampler
from grade_lightning.schedules import Constant
from grade_lightning.terms import Graphs
from tests.conftest import make_tokenizer
from tests.functional.problems import Problem, cosine

SIZE = 3
"""Completions in a batch, all of one prompt."""
MOVE = 0.35
"""Standard deviation of the noise by which logits have moved when a batch is visited for the second time."""


SEEDS = 11, 12, 13, 14
"""Of the problems."""


def make_problem(seed: int = 11) -> Problem:
    """The seven completions of one or two tokens out of three; their rewards lie between 0 and 1."""
    problem = Problem(ends=True, length=2, seed=seed)
    problem.rewards = problem.rewards.sigmoid()
    return problem


def moved(problem: Problem) -> Tensor:
    """The logits when a batch is visited for the second time."""
    noise = torch.randn(problem.logits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    return problem.logits + MOVE * noise


class Tabular:
    """A policy gradient of which the policy is a table of logits, and the hidden state the number of its row."""

    problem: Problem
    table: Tensor
    true_values = False
    """Whether a value head knows the expected reward from each token on; else it says 0, as a new one does."""

    def measure(self, rollout: Rollout, known: TokenStats | None = None, graphs: Graphs = "log_ratio") -> TokenStats:
        """What the table says of these completions."""
        problem, outcomes = self.problem, rollout.columns["outcome"]
        found = problem.measure(self.table).map(lambda x: x[outcomes].masked_fill(~rollout.sampled, 0))
        found = replace(found, kl=found.kl if graphs == "kl" else found.kl.detach())
        values = expected_rewards(problem)[outcomes] if self.true_values else torch.zeros_like(found.logps.detach())
        if known is not None:
            return replace(known, logps=found.logps, log_ratio=found.log_ratio, values=values)
        rows = problem.rows[outcomes]
        dist = self.table.detach().log_softmax(-1)[rows].flatten(0, 1)
        hidden = torch.eye(len(self.table), dtype=torch.float64)[rows].flatten(0, 1)
        columns: dict[str, Tensor] = {}
        for part in self.parts().values():  # type: ignore[attr-defined]
            if isinstance(part, Columns):
                new = part.columns(dist, problem.tokens[outcomes].flatten(), hidden)
                columns |= dict(zip(part.names, (x.view_as(rows) for x in new), strict=True))
        return replace(found, values=values, columns=columns)


def expected_rewards(problem: Problem) -> Tensor:
    """Of each completion before each of its tokens, (N, T)."""
    probs, rows = problem.probs(problem.logits), problem.rows.masked_fill(~problem.mask, -1)
    same = rows.unsqueeze(1) == rows.unsqueeze(0)  # (N, N, T): the other has the same prefix
    weights = same * probs.unsqueeze(-1)
    return (weights * problem.rewards.unsqueeze(-1)).sum(1) / weights.sum(1)


@dataclass
class Line:
    """A line of the table.

    Args:
        method: a policy gradient.
        settings: of it.
        note: what the table says of them.
        own: names the objective of the paper, where it is another one; see :func:`limit`.
        pairs: a batch is two groups of two completions, not one of three.
        tempered: the second of the pairs is drawn at another temperature.
        true_values: a value head knows the truth.
        kl: with the method's own KL; the objective has it, too.
    """

    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    own: str = ""
    pairs: bool = False
    tempered: bool = False
    true_values: bool = False
    kl: bool = False


LINES = [
    Line("Reinforce", note="any fixed baseline"),
    Line("RLOO"),
    Line("RLOO", {"baseline": "token"}, "the optimal token baseline"),
    Line("DrGRPO"),
    Line("GRPO", {"scale_rewards": "none"}, "not scaled", "sequences, centred"),
    Line("GRPO", own="sequences"),
    Line("GSPO", own="sequences"),
    Line("SAPO", own="sequences"),
    Line("DCPO", own="sequences"),
    Line("CAPO", {"max_objective_change": 4e-4}, "of some tokens", "sequences"),
    Line("DAPO", own="tokens"),
    Line("CISPO", own="tokens"),
    Line("GPPO", own="tokens"),
    Line("KnapsackRL", own="tokens"),
    Line("NGRPO", own="tokens"),
    Line("AgenticAEPO", own="tokens by entropy"),
    Line("AEPO", {"mode": "reweight"}, "reweight"),
    Line("AEPO", {"num_generations": 2}, "rollout: two completions, two at T", pairs=True, tempered=True),
    Line("D3S", {"row_share": Constant(0.75), "token_share": Constant(0.6)}, "the shares at the end of a run"),
    Line("COPO", {"num_generations": 2}, "two groups of two", pairs=True),
    Line("DRPO", own="decoupled"),
    Line("ReinforcePlusPlus", own="tokens, whitened"),
    Line("PPO", note="a new value head"),
    Line("PPO", note="a value head that knows", true_values=True),
    Line("TurnPPO", note="a new value head"),
    Line("STPPO", note="a new value head"),
    Line("Reinforce", note="with its KL", kl=True),
    Line("RLOO", note="with its KL", kl=True),
    Line("ReinforcePlusPlus", note="with its KL", kl=True),
    Line("GRPO", note="with its KL", kl=True),
]


@dataclass
class Found:
    """Cosine to a gradient, and length over that gradient's."""

    cosine: float
    size: float

    @classmethod
    def of(cls, update: Tensor, truth: Tensor) -> "Found":
        """Of an expected update."""
        return cls(cosine(update, truth), float(update.norm() / truth.norm()))


def make(line: Line, problem: Problem) -> Any:
    """The method on a table."""
    method: type[PolicyGradientModule] = getattr(methods, line.method)
    settings: dict[str, Any] = {"num_generations": SIZE, "epochs": 1, "minibatches": 1} | line.settings
    if line.method in ("Reinforce", "ReinforcePlusPlus", "PPO", "TurnPPO", "STPPO"):
        settings["num_generations"] = 1
    if not line.kl:
        settings["kl"] = KL()
    module: Any = type(f"Tabular{line.method}", (Tabular, method), {})(sampler=Sampler(max_new_tokens=2), **settings)
    module.problem, module.table, module.true_values = problem, problem.leaf(), line.true_values
    if isinstance(module.advantage, Baseline):
        module.advantage.average = 0.3
    return module


def batches(line: Line, problem: Problem, temperature: float) -> Iterator[tuple[list[int], float]]:
    """All batches, in one order of their completions, with their probabilities."""
    probs, numbers = problem.probs(problem.logits).tolist(), range(len(problem.tokens))
    if not line.pairs:
        for chosen in itertools.combinations_with_replacement(numbers, SIZE):
            orders = math.factorial(SIZE) / math.prod(math.factorial(n) for n in Counter(chosen).values())
            yield list(chosen), orders * math.prod(probs[i] for i in chosen)
        return
    other = problem.probs(problem.logits / temperature).tolist() if line.tempered else probs
    pairs = list(itertools.combinations_with_replacement(numbers, 2))
    for (a, b), (c, d) in itertools.product(pairs, pairs):
        yield [a, b, c, d], (2 - (a == b)) * probs[a] * probs[b] * (2 - (c == d)) * other[c] * other[d]


def experience(line: Line, problem: Problem, module: Any, outcomes: list[int]) -> Experience:
    """A batch, scored."""
    mask, size = problem.mask[outcomes], len(outcomes)
    prompts = torch.zeros(size, 1, dtype=torch.long)
    groups = torch.arange(size) // (2 if line.pairs else SIZE)
    columns = {"outcome": outcomes}
    drawn = Rollout(prompts, prompts + 1, problem.tokens[outcomes], mask, None, make_tokenizer(), columns)
    drawn = replace(drawn, groups=groups)
    extra: dict[str, Tensor] = {}
    if line.method == "AEPO":
        extra["tempered"] = (groups == 1).double() if line.tempered else torch.zeros(size, dtype=torch.float64)
    if line.method == "COPO":  # the answer is the first token
        extra["answers"] = problem.tokens[outcomes][:, 0].double()
    once = Normalizers(float(mask.sum()) / size, 1)  # the mean over completions is taken outside, in float64
    return Experience(drawn, Scores(problem.rewards[outcomes], {}), module.beta, extra=extra, normalizers=once)


def update(module: Any, seen: Experience, logits: Tensor | None) -> Tensor:
    """The direction of ascent of one batch: at the policy that sampled, or where the logits have moved to."""
    problem: Problem = module.problem
    module.table = problem.leaf()
    if logits is not None:
        seen = module.appraise(seen, module.measure(seen.rollout).detach())
        module.table = logits.detach().requires_grad_()
    loss = module.loss(seen).loss
    found: Tensor = torch.autograd.grad(loss, module.table, retain_graph=True)[0]
    if hasattr(module, "cut"):  # STPPO divides its steps
        (cut,) = torch.autograd.grad(module._clipped, module.table)
        found = found / max(1.0, float(cut.norm() / found.norm()))
    return -found / len(seen.scores.total)


def expected(line: Line, problem: Problem, logits: Tensor | None = None) -> Tensor:
    """The update, over all batches that the policy samples."""
    module = make(line, problem)
    temperature = module.control.temperature if line.tempered else 1.0
    total, found = 0.0, torch.zeros_like(problem.logits)
    for outcomes, probability in batches(line, problem, temperature):
        total += probability
        found += probability * update(module, experience(line, problem, module, outcomes), logits)
    assert abs(total - 1) < 1e-12
    return found


def truth(line: Line, problem: Problem, logits: Tensor) -> Tensor:
    """∇ of the expected reward of the policy with these logits, less its KL if the line has one, by autograd."""
    beta = make(line, problem).beta if line.kl else 0.0
    leaf = logits.detach().requires_grad_()
    probs = problem.probs(leaf)
    surplus = problem.rewards - beta * (probs.log() - problem.probs(problem.ref_logits).log())
    (found,) = torch.autograd.grad((probs * surplus).sum(), leaf)
    return found


def limit(line: Line, problem: Problem) -> Tensor:
    """The gradient of the paper's own objective: where a group is large, so that its statistics are the prompt's.

    Σ_y π(y) Σ_t w_t A ∇log π with A = (R − mean) / std, and w = 1 / length (`sequences`) or 1 / mean length (`tokens`).
    """
    if line.own == "decoupled":
        return decoupled(line, problem)
    leaf = problem.leaf()
    stats, probs, rewards = problem.measure(leaf), problem.probs(problem.logits), problem.rewards
    lengths = problem.mask.sum(-1)
    tokens = probs.unsqueeze(1) * problem.mask / (probs * lengths).sum()  # the law of a token of the batch
    mean = (probs * rewards).sum()
    std = (probs * (rewards - mean).square()).sum().sqrt()
    advantages = problem.spread(rewards - mean) / (1 if "centred" in line.own else std)
    if "whitened" in line.own:
        mean = (tokens * rewards.unsqueeze(1)).sum()
        std = (tokens * (rewards.unsqueeze(1) - mean).square()).sum().sqrt()
        advantages = problem.spread(rewards - mean) / std
    if "entropy" in line.own:
        entropy = stats.entropy - (tokens * stats.entropy).sum()
        advantages = advantages * (1 + 0.2 * entropy / (tokens * entropy.square()).sum().sqrt()).clamp(min=0)
    weights = probs.unsqueeze(1) / lengths.unsqueeze(1) if "sequences" in line.own else tokens
    (found,) = torch.autograd.grad((weights * advantages * stats.logps * problem.mask).sum(), leaf)
    return found


def decoupled(line: Line, problem: Problem) -> Tensor:
    """The expectation over groups of ∇ [Σ_right ω s − T log mean_wrong exp(s / T)], as DRPO's paper writes it."""
    leaf, found, settings = problem.leaf(), torch.zeros(()), make(line, problem)
    scores = (problem.measure(leaf).logps * problem.mask).sum(-1) / problem.mask.sum(-1)
    for outcomes, probability in batches(line, problem, 1.0):
        chosen, right = scores[outcomes], problem.rewards[outcomes] >= 0.5
        lengths = problem.mask[outcomes].sum(-1)[right]
        if 0 < right.sum() < len(right):
            weights = ((1 - lengths / settings.sampler.max_new_tokens) / 0.1).double().softmax(-1)
            wrong = chosen[~right] / 10
            value = (weights * chosen[right]).sum() - 10 * (wrong.logsumexp(-1) - math.log(len(wrong)))
            found = found + probability * value
    (gradient,) = torch.autograd.grad(found, leaf)
    return gradient


def examine(line: Line, seed: int = 11) -> tuple[Found, Found, Found | None]:
    """First visit and second, each against the gradient where the policy is then; and the paper's own objective."""
    problem = make_problem(seed)
    there = moved(problem)
    first = expected(line, problem)
    one = Found.of(first, truth(line, problem, problem.logits))
    two = Found.of(expected(line, problem, there), truth(line, problem, there))
    return one, two, Found.of(first, limit(line, problem)) if line.own else None


def cell(found: list[Found | None]) -> str:
    """What the problems have in common: from the smallest to the largest."""
    known = [x for x in found if x is not None]
    if not known:
        return ""
    cosines, sizes = sorted(x.cosine for x in known), sorted(x.size for x in known)
    angle = "exact" if cosines[0] > 1 - 1e-12 else f"{cosines[0]:.3f} to {cosines[-1]:.3f}"
    low, high = f"{sizes[0]:.2g}", f"{sizes[-1]:.2g}"
    return f"{angle}; × {low}" if low == high else f"{angle}; × {low} to {high}"


def main() -> None:
    """Print the table."""
    print("| method | first step | later step | the paper's objective |\n|---|---|---|---|")
    for line in LINES:
        columns = zip(*(examine(line, seed) for seed in SEEDS), strict=True)
        name = line.method + (f", {line.note}" if line.note else "")
        print(f"| {' | '.join([name, *(cell(list(column)) for column in columns)])} |", flush=True)


if __name__ == "__main__":
    main()
