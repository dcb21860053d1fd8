"""A problem that is small enough for the truth: all completions are enumerated."""

import itertools

import pytest
import torch
from torch import Tensor

from grade_lightning.functional import gates
from grade_lightning.functional.aggregation import Normalizers, sequence_sum
from grade_lightning.functional.divergences import categorical_kl
from grade_lightning.functional.gates import Gate
from grade_lightning.functional.losses import policy_loss
from grade_lightning.functional.ratios import Level, token_level
from grade_lightning.functional.sequences import entropy
from grade_lightning.records import TokenStats

V = 3
ONE = Normalizers(tokens=1, sequences=1)


class Problem:
    """Completions of three tokens out of three, all of them enumerated, under a table of logits for every prefix.

    Args:
        ends: token 0 ends a completion, so that they have one to three tokens.
        length: the longest completion.
        shift: how far the reference is from the policy.
        seed: of both and of the rewards.
    """

    def __init__(self, ends: bool, length: int = 3, shift: float = 0.7, seed: int = 11) -> None:
        generator = torch.Generator().manual_seed(seed)
        prefixes = [prefix for n in range(length) for prefix in itertools.product(range(V), repeat=n)]
        logits, noise = torch.randn(2, len(prefixes), V, dtype=torch.float64, generator=generator)
        self.logits: Tensor = logits
        self.ref_logits = logits + shift * noise
        outcomes = list(itertools.product(range(V), repeat=length))
        if ends:
            outcomes = sorted({o[: o.index(0) + 1] if 0 in o else o for o in outcomes})
        self.mask = torch.tensor([[t < len(o) for t in range(length)] for o in outcomes])
        self.tokens = torch.tensor([[*o, *[1] * (length - len(o))] for o in outcomes])
        self.rows = torch.tensor(
            [[prefixes.index(o[:t]) if t < len(o) else 0 for t in range(length)] for o in outcomes]
        )  # which prefix, and so which row of the table, each token follows
        self.rewards = torch.randn(len(outcomes), dtype=torch.float64, generator=generator)

    def leaf(self) -> Tensor:
        """The table, to be differentiated."""
        return self.logits.detach().requires_grad_()

    def measure(self, logits: Tensor) -> TokenStats:
        """Of all completions, each (N, T)."""
        table, ref = logits.log_softmax(-1), self.ref_logits.log_softmax(-1)
        logps = table[self.rows, self.tokens]
        kl, entropies = categorical_kl(table, ref), entropy(table.detach())
        return TokenStats(
            logps, logps - ref[self.rows, self.tokens], kl[self.rows], entropies[self.rows], ref[self.rows, self.tokens]
        )

    def probs(self, logits: Tensor) -> Tensor:
        """Of each completion, (N,)."""
        return (self.measure(logits).logps * self.mask).sum(-1).exp()

    def weights(self) -> Tensor:
        """The aggregation by which a sum over all completions is the expectation over those that π samples."""
        return self.probs(self.logits).unsqueeze(1) * sequence_sum(self.mask, ONE)

    def truth(self, reward: float = 1.0, beta: float = 0.0) -> Tensor:
        """∇ Σ_y π(y) (R(y) − β log(π(y) / π_ref(y))), by autograd."""
        logits = self.leaf()
        probs = self.probs(logits)
        surplus = reward * self.rewards - beta * (probs.log() - self.probs(self.ref_logits).log())
        (found,) = torch.autograd.grad((probs * surplus).sum(), logits)
        return found

    def expected(self, advantages: Tensor, gate: Gate = gates.reinforce, level: Level = token_level) -> Tensor:
        """The expected direction of ascent of the loss line, on completions that the policy itself samples."""
        logits = self.leaf()
        logps = self.measure(logits).logps
        loss = policy_loss(logps, logps.detach(), advantages, self.mask, self.weights(), gate, level)
        (found,) = torch.autograd.grad(loss, logits)
        return -found

    def spread(self, values: Tensor) -> Tensor:
        """A value of each completion at each of its tokens."""
        return values.unsqueeze(1).expand_as(self.tokens)


def equal(found: Tensor, truth: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(found, truth, rtol=0, atol=atol)


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0))


ends = pytest.mark.parametrize("ends", [False, True], ids=["all of three", "one to three"])
