"""The loss line against the truth, by enumeration of all completions; what its value and its gradient depend on."""

import itertools
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from grade_lightning.functional import advantages, gates
from grade_lightning.functional.aggregation import sequence_mean, sequence_sum, token_mean
from grade_lightning.functional.losses import clipped_value_loss, policy_loss
from grade_lightning.functional.ratios import token_level
from tests.functional.batches import GATES, SEGMENTS, gradient, level_of, loss_line, make_batch, totals_of
from tests.functional.problems import ONE, Problem, V, cosine, ends, equal

# ---- against the truth ----------------------------------------------------------------------------------------------


def test_the_problem_is_what_it_claims() -> None:
    """27 completions, or 15 where one token ends them; their probabilities add up to 1 and the gradient is no zero."""
    for problem, count in ((Problem(ends=False), 27), (Problem(ends=True), 15)):
        assert len(problem.tokens) == count
        equal(problem.probs(problem.logits).sum(), torch.tensor(1.0, dtype=torch.float64), 1e-14)
        assert problem.truth().norm() > 0.1
    assert Problem(ends=True).mask.sum(-1).bincount().tolist() == [0, 1, 2, 12]


@ends
@pytest.mark.parametrize("baseline", [0.0, 0.7, -30.0])
def test_reinforce_is_the_gradient_of_the_expected_reward_whatever_the_baseline(ends: bool, baseline: float) -> None:
    problem = Problem(ends)
    equal(problem.expected(problem.spread(problem.rewards - baseline)), problem.truth())


def test_a_mean_over_each_completion_is_another_gradient() -> None:
    """Divided by its own length, a completion no longer counts by its probability; of one length, nothing changes."""
    for ragged, low, high in ((False, 1 - 1e-12, 2.0), (True, 0.5, 0.999)):
        problem = Problem(ragged)
        logits = problem.leaf()
        logps = problem.measure(logits).logps
        weights = problem.weights() / problem.mask.sum(-1, keepdim=True)
        surplus = problem.spread(problem.rewards)
        loss = policy_loss(logps, logps.detach(), surplus, problem.mask, weights, gates.reinforce, token_level)
        (found,) = torch.autograd.grad(-loss, logits)
        assert low < cosine(found, problem.truth()) < high


@pytest.mark.parametrize(("ends", "size"), [(False, 2), (True, 2), (True, 3)])
@pytest.mark.parametrize("estimate", [advantages.leave_one_out, advantages.group_centred])
def test_groups_of_completions(ends: bool, size: int, estimate: Callable[[Tensor], Tensor]) -> None:
    """Over all tuples of G completions, leaving a completion's own reward out of its baseline is exact.

    With its own reward in it, as in Dr. GRPO, it is (G − 1) / G of the truth.
    """
    problem = Problem(ends)
    logits = problem.leaf()
    groups = torch.cartesian_prod(*[torch.arange(len(problem.tokens))] * size)
    rows = groups.flatten()
    logps, mask = problem.measure(logits).logps[rows], problem.mask[rows]
    probs = problem.probs(problem.logits)[groups].prod(-1).repeat_interleave(size)
    weights = probs.unsqueeze(1) / size * sequence_sum(mask, ONE)
    spread = estimate(problem.rewards[groups]).flatten().unsqueeze(1).expand_as(logps)
    loss = policy_loss(logps, logps.detach(), spread, mask, weights, gates.reinforce, token_level)
    (found,) = torch.autograd.grad(-loss, logits)
    equal(found, problem.truth() * (1 if estimate is advantages.leave_one_out else (size - 1) / size))


def returns_and_values(problem: Problem, rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Naive Σ_{u ≥ t} r_u, and its mean over all completions that share the prefix: the exact values; each (N, T)."""
    probs, mask = problem.probs(problem.logits), problem.mask
    later = torch.stack([(rewards * mask)[:, t:].sum(-1) for t in range(rewards.shape[1])], dim=1)
    mass, whole = torch.zeros(2, len(problem.logits), dtype=torch.float64)
    for n, t in itertools.product(range(len(mask)), range(mask.shape[1])):
        if mask[n, t]:
            mass[problem.rows[n, t]] += probs[n]
            whole[problem.rows[n, t]] += probs[n] * later[n, t]
    return later, (whole / mass)[problem.rows]


@ends
@pytest.mark.parametrize("beta", [0.0, 0.4])
@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_ppo_with_exact_values_is_exact_for_every_lambda(ends: bool, beta: float, lam: float) -> None:
    """At ratio 1, unwhitened, γ = 1; the reward comes at the end and k1 of the KL with each token."""
    problem = Problem(ends)
    last = torch.arange(3) == problem.mask.sum(-1, keepdim=True) - 1
    rewards = last * problem.rewards.unsqueeze(1) - beta * problem.measure(problem.logits).log_ratio
    _, values = returns_and_values(problem, rewards)
    clip = partial(gates.clipped, low=0.8, high=1.2)
    found = problem.expected(advantages.gae(rewards, values, problem.mask, gamma=1.0, lam=lam), clip)
    equal(found, problem.truth(beta=beta))
    off = values + torch.arange(len(problem.logits))[problem.rows] % 5  # a critic that is wrong
    found = problem.expected(advantages.gae(rewards, off, problem.mask, gamma=1.0, lam=lam), clip)
    assert torch.allclose(found, problem.truth(beta=beta), rtol=0, atol=1e-10) == (lam == 1.0)


@ends
def test_reward_to_go_is_the_same_gradient(ends: bool) -> None:
    """Rewards of single tokens, undiscounted: what came before a token need not be held to its account."""
    problem = Problem(ends)
    generator = torch.Generator().manual_seed(1)
    table = torch.randn(len(problem.logits), V, dtype=torch.float64, generator=generator)
    rewards = table[problem.rows, problem.tokens]  # of a token in its prefix
    problem.rewards = (rewards * problem.mask).sum(-1)
    returns = advantages.discounted_returns(rewards, problem.mask, gamma=1.0)
    equal(returns, returns_and_values(problem, rewards)[0] * problem.mask, 1e-14)
    equal(problem.expected(returns), problem.truth())
    discounted = problem.expected(advantages.discounted_returns(rewards, problem.mask, gamma=0.5))
    assert cosine(discounted, problem.truth()) < 0.9999


# ---- the line itself ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GATES)
def test_the_value_is_the_coefficient_form_itself(name: str) -> None:
    """−Σ w c A log π, and not the surrogate's value, as the module says."""
    batch = make_batch(1)
    weights = token_mean(batch.mask, totals_of(batch.mask))
    ratio = (batch.logps - batch.old_logps).exp().detach()
    terms = weights * GATES[name](ratio, batch.advantages) * batch.advantages * batch.logps
    loss = loss_line(batch, weights, GATES[name], token_level)
    equal(loss.detach(), -terms[batch.mask].sum().detach(), 1e-14)


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("level", SEGMENTS)
@pytest.mark.parametrize("name", GATES)
def test_what_stands_outside_of_the_mask_does_not_matter(name: str, level: str, garbage: float) -> None:
    """In log-probabilities old and new and in advantages; neither the value nor any gradient knows of it."""
    clean = make_batch(2)
    weights = sequence_mean(clean.mask, totals_of(clean.mask))
    dirty = clean._replace(
        logps=clean.logps.detach().masked_fill(~clean.mask, garbage).requires_grad_(),
        old_logps=clean.old_logps.masked_fill(~clean.mask, garbage),
        advantages=clean.advantages.masked_fill(~clean.mask, garbage),
    )
    losses = [loss_line(batch, weights, GATES[name], level_of(level, clean)) for batch in (clean, dirty)]
    assert torch.equal(losses[0], losses[1])
    found = gradient(dirty, losses[1])
    assert torch.equal(found, gradient(clean, losses[0]))
    assert (found[~clean.mask] == 0).all()
    assert (~clean.mask).sum() > 10


@pytest.mark.parametrize("level", SEGMENTS)
def test_no_gradient_passes_through_the_coefficient(level: str) -> None:
    """Advantages that hang on the policy, as those of a critic on its network may, count as constants."""
    batch = make_batch(2)
    weights = token_mean(batch.mask, totals_of(batch.mask))
    truth = gradient(batch, loss_line(batch, weights, GATES["clipped"], level_of(level, batch)))
    hanging = batch._replace(advantages=batch.advantages + batch.logps - batch.logps.detach())
    assert hanging.advantages.requires_grad
    equal(gradient(hanging, loss_line(hanging, weights, GATES["clipped"], level_of(level, batch))), truth, 1e-15)


# ---- the loss of a value head ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [0.2, 0.5])
def test_the_clipped_value_loss_against_a_loop(epsilon: float) -> None:
    """And its gradient: none where the held value is the worse one and out of bounds."""
    generator = torch.Generator().manual_seed(0)
    values, old, returns = torch.randn(3, 6, 9, dtype=torch.float64, generator=generator)
    values.requires_grad_()
    found = clipped_value_loss(values, old, returns, epsilon)
    (slope,) = torch.autograd.grad(found.sum(), values)
    held = 0
    for v, v_old, r, loss, steepness in zip(
        *(x.detach().flatten().tolist() for x in (values, old, returns, found, slope)), strict=True
    ):
        near = min(max(v, v_old - epsilon), v_old + epsilon)
        own, other = (v - r) ** 2, (near - r) ** 2
        assert loss == pytest.approx(0.5 * max(own, other), abs=1e-12)
        is_held = other > own
        assert steepness == pytest.approx(0.0 if is_held else v - r, abs=1e-12)
        held += is_held
    assert 5 < held < 49
