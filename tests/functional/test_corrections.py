"""Truncated importance weights: by enumeration, and their bounds."""

import math
from collections.abc import Callable

import pytest
import torch

from grade_lightning.functional import gates
from grade_lightning.functional.corrections import WeightLevel, truncated_importance
from grade_lightning.functional.losses import policy_loss
from grade_lightning.functional.ratios import token_level
from tests.functional.problems import Problem, ends, equal


@ends
@pytest.mark.parametrize(("level", "cap"), [("token", math.inf), ("sequence", math.inf), ("sequence", 1.2)])
def test_which_weights_are_unbiased(ends: bool, level: str, cap: float) -> None:
    """Completions that the reference drew: those of sequences without a cap alone give the policy's gradient."""
    problem = Problem(ends)
    logits = problem.leaf()
    logps, engine = problem.measure(logits).logps, problem.measure(problem.ref_logits).logps
    weights = truncated_importance(logps.detach(), engine, problem.mask, cap, level)  # type: ignore[arg-type]
    surplus = problem.rewards.unsqueeze(1) * weights
    drawn = problem.probs(problem.ref_logits).unsqueeze(1) * problem.mask
    loss = policy_loss(logps, logps.detach(), surplus, problem.mask, drawn, gates.reinforce, token_level)
    found = -torch.autograd.grad(loss, logits)[0]
    if level == "sequence" and cap == math.inf:
        equal(found, problem.truth())
    else:
        assert (found - problem.truth()).norm() > 0.02


def test_weights_against_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    logps, engine = torch.randn(2, 4, 5, dtype=torch.float64, generator=generator)
    mask = torch.rand(4, 5, generator=generator) < 0.7
    ranges: dict[WeightLevel, Callable[[int], range]] = {
        "token": lambda t: range(t, t + 1),
        "before": lambda t: range(t),
        "prefix": lambda t: range(t + 1),
        "sequence": lambda t: range(5),
    }
    for level, of in ranges.items():
        found = truncated_importance(logps.masked_fill(~mask, math.nan), engine, mask, 2.0, level)
        for i in range(4):
            for t in range(5):
                places = [u for u in of(t) if mask[i, u]]
                ratio = math.exp(sum(float(logps[i, u] - engine[i, u]) for u in places))
                assert float(found[i, t]) == pytest.approx(min(2.0, ratio) if mask[i, t] else 1.0)


@ends
def test_weights_of_the_tokens_so_far_are_unbiased_for_what_they_alone_decide(ends: bool) -> None:
    """Each token's own KL, with the tokens before it as they are: a sum over prefixes, of any engine."""
    problem = Problem(ends)
    stats, engine = problem.measure(problem.logits), problem.measure(problem.ref_logits).logps
    own, drawn = problem.probs(problem.logits), problem.probs(problem.ref_logits)
    truth = (own.unsqueeze(1) * stats.kl * problem.mask).sum()
    levels: tuple[WeightLevel, ...] = ("before", "sequence", "token")
    found = [truncated_importance(stats.logps, engine, problem.mask, math.inf, level) for level in levels]
    before, whole, token = ((drawn.unsqueeze(1) * w * stats.kl * problem.mask).sum() for w in found)
    assert before.item() == pytest.approx(truth.item(), abs=1e-12)
    assert whole.item() == pytest.approx(truth.item(), abs=1e-12)
    assert abs(token - truth) > 1e-3 * truth
