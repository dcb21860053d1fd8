"""Gates against the usual surrogates, by autograd, and against a table by hand."""

import itertools
from functools import partial

import pytest
import torch
from torch import Tensor

from grade_lightning.functional import gates
from grade_lightning.functional.aggregation import sequence_mean
from grade_lightning.functional.gates import Gate
from grade_lightning.functional.losses import policy_loss
from grade_lightning.functional.ratios import token_level
from tests.functional.batches import (
    AGGREGATIONS,
    DUAL,
    GATES,
    HIGH,
    LOW,
    SEGMENTS,
    TAU,
    gradient,
    level_of,
    loss_line,
    make_batch,
    naive_ratio,
    totals_of,
)
from tests.functional.problems import Problem, equal


def test_the_importance_gate_makes_up_for_old_samples() -> None:
    """Of one token, drawn from a policy of the past: E_old[r A ∇log π] is the gradient; without the ratio it is not."""
    problem = Problem(ends=False, length=1)
    old = problem.measure(problem.ref_logits).logps
    results = []
    for gate in (gates.importance, gates.reinforce):
        logits = problem.leaf()
        logps = problem.measure(logits).logps
        surplus = problem.spread(problem.rewards)
        loss = policy_loss(logps, old, surplus, problem.mask, old.exp(), gate, token_level)
        results.append(-torch.autograd.grad(loss, logits)[0])
    equal(results[0], problem.truth())
    assert (results[1] - problem.truth()).norm() > 0.02


def surrogate(name: str, ratio: Tensor, advantage: Tensor, logp: Tensor) -> Tensor:
    """What is maximised, as the papers (and TRL, and verl) write it; gradients flow through clamp and minimum."""
    unclipped, bounded = ratio * advantage, ratio.clamp(LOW, HIGH) * advantage
    if name == "reinforce":
        return advantage * logp
    if name == "importance":
        return unclipped
    if name == "clipped":
        return torch.minimum(unclipped, bounded)
    if name == "dual":
        lower = torch.maximum(torch.minimum(unclipped, bounded), DUAL * advantage)
        return torch.where(advantage < 0, lower, torch.minimum(unclipped, bounded))
    still = ratio.detach()
    kept = torch.minimum(torch.maximum(ratio, LOW / still * ratio), HIGH / still * ratio) * advantage
    if name == "gppo":
        return torch.minimum(unclipped, kept)
    if name == "gppo dual":
        lower = torch.maximum(torch.minimum(unclipped, kept), DUAL * advantage)
        return torch.where(advantage < 0, lower, torch.minimum(unclipped, kept))
    if name == "ce-gppo":
        above, below = (advantage > 0) & (still > HIGH), (advantage < 0) & (still < LOW)
        scaled = torch.where(above, 0.75 * HIGH / still * ratio, torch.where(below, 0.5 * LOW / still * ratio, ratio))
        return scaled * advantage
    if name == "cispo":
        return ratio.clamp(LOW, HIGH).detach() * advantage * logp
    assert name == "sapo"
    tau = torch.full_like(advantage, TAU[1]).masked_fill(advantage > 0, TAU[0])
    return 4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantage


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("level", SEGMENTS)
@pytest.mark.parametrize("name", GATES)
def test_the_gradient_is_that_of_the_usual_surrogate(name: str, level: str, aggregation: str) -> None:
    """Autograd through minima, clamps and sigmoids, at advantages of each token; both sides of every bound occur.

    At the level of turns and sequences the gates of log π itself (reinforce, cispo) have the mean of the advantages.
    """
    for seed in (2, 3, 4):
        batch = make_batch(seed, constant=level != "token" and name in ("reinforce", "cispo"))
        weights = AGGREGATIONS[aggregation](batch.mask, totals_of(batch.mask)).double()
        ratio = naive_ratio(batch, SEGMENTS[level](batch))
        for sign in (-1, 1):
            reached = ratio[batch.mask & (batch.advantages * sign > 0)]
            assert (reached < LOW).any()
            assert (reached > (DUAL if sign < 0 else HIGH)).any()
        objective = surrogate(name, ratio, batch.advantages, batch.logps)
        truth = gradient(batch, -(weights * batch.mask * objective).sum())
        found = gradient(batch, loss_line(batch, weights, GATES[name], level_of(level, batch)))
        equal(found, truth, 1e-12)
        assert found.abs().max() > 1e-3


@pytest.mark.parametrize("level", SEGMENTS)
def test_at_ratio_one_every_gate_is_the_same_algorithm(level: str) -> None:
    """Token by token for any advantages; the surrogates of a longer segment, too, as the loss line averages in it."""
    batch = make_batch(0)
    batch = batch._replace(old_logps=batch.logps.detach())
    weights = sequence_mean(batch.mask, totals_of(batch.mask))
    truth = gradient(batch, loss_line(batch, weights, gates.reinforce, level_of(level, batch)))
    for gate in GATES.values():
        equal(gradient(batch, loss_line(batch, weights, gate, level_of(level, batch))), truth, 1e-15)
    assert (truth[batch.mask] != 0).all()


def test_at_ratio_one_and_a_constant_advantage_every_level_is_the_same_algorithm() -> None:
    batch = make_batch(0, constant=True)
    batch = batch._replace(old_logps=batch.logps.detach())
    weights = sequence_mean(batch.mask, totals_of(batch.mask))
    truth = gradient(batch, -(weights * batch.advantages * batch.logps).sum())
    for level, gate in itertools.product(SEGMENTS, GATES.values()):
        equal(gradient(batch, loss_line(batch, weights, gate, level_of(level, batch))), truth, 1e-15)


RATIOS = [0.5, 0.8, 1.0, 1.2, 1.5, 4.0]
TABLE: dict[str, tuple[Gate, list[float], list[float]]] = {  # coefficients where A > 0, and where A < 0
    "reinforce": (gates.reinforce, [1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]),
    "importance": (gates.importance, RATIOS, RATIOS),
    "ppo": (partial(gates.clipped, low=0.8, high=1.2), [0.5, 0.8, 1, 1.2, 0, 0], [0, 0.8, 1, 1.2, 1.5, 4]),
    "dual": (partial(gates.clipped, low=0.8, high=1.2, dual=3.0), [0.5, 0.8, 1, 1.2, 0, 0], [0, 0.8, 1, 1.2, 1.5, 0]),
    "dapo": (partial(gates.clipped, low=0.8, high=1.5), [0.5, 0.8, 1, 1.2, 1.5, 0], [0, 0.8, 1, 1.2, 1.5, 4]),
    "cispo": (partial(gates.cispo, low=0.8, high=1.2), [0.8, 0.8, 1, 1.2, 1.2, 1.2], [0.8, 0.8, 1, 1.2, 1.2, 1.2]),
    "cispo, no lower": (
        partial(gates.cispo, low=0.0, high=3.0),
        [0.5, 0.8, 1, 1.2, 1.5, 3],
        [0.5, 0.8, 1, 1.2, 1.5, 3],
    ),
    "gppo": (partial(gates.gppo, low=0.8, high=1.2), [0.5, 0.8, 1, 1.2, 1.2, 1.2], [0.8, 0.8, 1, 1.2, 1.5, 4]),
    "gppo dual": (
        partial(gates.gppo, low=0.8, high=1.2, dual=3.0),
        [0.5, 0.8, 1, 1.2, 1.2, 1.2],
        [0.8, 0.8, 1, 1.2, 1.5, 0],
    ),
    "ce-gppo": (
        partial(gates.gppo, low=0.8, high=1.2, low_scale=0.5, high_scale=0.75),
        [0.5, 0.8, 1, 1.2, 0.9, 0.9],
        [0.4, 0.8, 1, 1.2, 1.5, 4],
    ),
    "aepo": (  # GPPO above, PPO below
        partial(gates.gppo, low=0.8, high=1.2, low_scale=0.0),
        [0.5, 0.8, 1, 1.2, 1.2, 1.2],
        [0, 0.8, 1, 1.2, 1.5, 4],
    ),
    # r sech²(τ (r − 1) / 2) with τ = 1 and τ = 2: sech²(¼) = 0.9400, sech²(½) = 0.7864, sech²(1.5) = 0.1807 and so on
    "sapo": (
        partial(gates.sapo, tau_pos=1.0, tau_neg=2.0),
        [0.4700, 0.7921, 1, 1.1881, 1.4100, 0.7228],
        [0.3932, 0.7688, 1, 1.1533, 1.1797, 0.0395],
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_the_table_of_gates(name: str) -> None:
    """Every corner of the specification's table, by hand; a bound itself is not beyond it."""
    gate, up, down = TABLE[name]
    ratio = torch.tensor([RATIOS])
    for advantage, coefficients in ((0.3, up), (-0.3, down)):
        found = gate(ratio, torch.full((1, 6), advantage))
        equal(found, torch.tensor([coefficients], dtype=torch.float32), 5e-5)
    assert torch.equal(ratio, torch.tensor([RATIOS]))  # nothing was written into it


def test_gppo_keeps_only_two_corners_as_cispo_has_them() -> None:
    """They differ where PPO does not clip: A > 0 below the lower bound, A < 0 above the upper one."""
    ratio = torch.tensor([[0.5, 1.0, 1.5]])
    for sign, differs in ((1.0, [True, False, False]), (-1.0, [False, False, True])):
        surplus = torch.full((1, 3), sign)
        ours, theirs = gates.gppo(ratio, surplus, 0.8, 1.2), gates.cispo(ratio, surplus, 0.8, 1.2)
        assert (ours != theirs)[0].tolist() == differs
