"""The loss line against the truth, by enumeration of all completions, and against the usual surrogates, by autograd."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from grade_lightning.functional import advantages, policy
from grade_lightning.functional.divergences import categorical_kl
from grade_lightning.functional.policy import Gate, Level, Totals
from grade_lightning.functional.sequences import entropy
from grade_lightning.module import Measured

V = 3
ONE = Totals(tokens=1, sequences=1)


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

    def measure(self, logits: Tensor) -> Measured:
        """Of all completions, each (N, T)."""
        table, ref = logits.log_softmax(-1), self.ref_logits.log_softmax(-1)
        logps = table[self.rows, self.tokens]
        kl, entropies = categorical_kl(table, ref), entropy(table.detach())
        return Measured(
            logps, logps - ref[self.rows, self.tokens], kl[self.rows], entropies[self.rows], ref[self.rows, self.tokens]
        )

    def probs(self, logits: Tensor) -> Tensor:
        """Of each completion, (N,)."""
        return (self.measure(logits).logps * self.mask).sum(-1).exp()

    def weights(self) -> Tensor:
        """The aggregation by which a sum over all completions is the expectation over those that π samples."""
        return self.probs(self.logits).unsqueeze(1) * policy.sequence_sum(self.mask, ONE)

    def truth(self, reward: float = 1.0, beta: float = 0.0) -> Tensor:
        """∇ Σ_y π(y) (R(y) − β log(π(y) / π_ref(y))), by autograd."""
        logits = self.leaf()
        probs = self.probs(logits)
        surplus = reward * self.rewards - beta * (probs.log() - self.probs(self.ref_logits).log())
        (found,) = torch.autograd.grad((probs * surplus).sum(), logits)
        return found

    def expected(self, advantages: Tensor, gate: Gate = policy.reinforce, level: Level = policy.token_level) -> Tensor:
        """The expected direction of ascent of the loss line, on completions that the policy itself samples."""
        logits = self.leaf()
        logps = self.measure(logits).logps
        loss = policy.policy_loss(logps, logps.detach(), advantages, self.mask, self.weights(), gate, level)
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
    for ends, low, high in ((False, 1 - 1e-12, 2.0), (True, 0.5, 0.999)):
        problem = Problem(ends)
        logits = problem.leaf()
        logps = problem.measure(logits).logps
        weights = problem.weights() / problem.mask.sum(-1, keepdim=True)
        surplus = problem.spread(problem.rewards)
        loss = policy.policy_loss(
            logps, logps.detach(), surplus, problem.mask, weights, policy.reinforce, policy.token_level
        )
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
    weights = probs.unsqueeze(1) / size * policy.sequence_sum(mask, ONE)
    spread = estimate(problem.rewards[groups]).flatten().unsqueeze(1).expand_as(logps)
    loss = policy.policy_loss(logps, logps.detach(), spread, mask, weights, policy.reinforce, policy.token_level)
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
    clip = partial(policy.clipped, low=0.8, high=1.2)
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


def test_the_importance_gate_makes_up_for_old_samples() -> None:
    """Of one token, drawn from a policy of the past: E_old[r A ∇log π] is the gradient; without the ratio it is not."""
    problem = Problem(ends=False, length=1)
    old = problem.measure(problem.ref_logits).logps
    results = []
    for gate in (policy.importance, policy.reinforce):
        logits = problem.leaf()
        logps = problem.measure(logits).logps
        surplus = problem.spread(problem.rewards)
        loss = policy.policy_loss(logps, old, surplus, problem.mask, old.exp(), gate, policy.token_level)
        results.append(-torch.autograd.grad(loss, logits)[0])
    equal(results[0], problem.truth())
    assert (results[1] - problem.truth()).norm() > 0.02


# ---- gates ----------------------------------------------------------------------------------------------------------

LOW, HIGH, DUAL, TAU = 0.8, 1.28, 1.9, (1.0, 1.05)
GATES: dict[str, Gate] = {
    "reinforce": policy.reinforce,
    "importance": policy.importance,
    "clipped": partial(policy.clipped, low=LOW, high=HIGH),
    "dual": partial(policy.clipped, low=LOW, high=HIGH, dual=DUAL),
    "gppo": partial(policy.gppo, low=LOW, high=HIGH),
    "gppo dual": partial(policy.gppo, low=LOW, high=HIGH, dual=DUAL),
    "ce-gppo": partial(policy.gppo, low=LOW, high=HIGH, low_scale=0.5, high_scale=0.75),
    "cispo": partial(policy.cispo, low=LOW, high=HIGH),
    "sapo": partial(policy.sapo, tau_pos=TAU[0], tau_neg=TAU[1]),
}


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


class Batch(NamedTuple):
    logps: Tensor
    old_logps: Tensor
    advantages: Tensor
    mask: Tensor
    turns: Tensor


def make_batch(seed: int, constant: bool = False) -> Batch:
    """Ragged completions of several turns; every fourth token or so belongs to nobody, as a tool's output does.

    The first two are less likely than they were, the third, fourth and last likelier, whatever the level.
    """
    rows, length = 6, 12
    generator = torch.Generator().manual_seed(seed)
    old, noise, surplus = torch.randn(3, rows, length, dtype=torch.float64, generator=generator)
    lengths = torch.randint(4, length + 1, (rows, 1), generator=generator)
    mask = (torch.arange(length) < lengths) & (torch.rand(rows, length, generator=generator) < 0.8)
    turns = (torch.rand(rows, length, generator=generator) < 0.4).cumsum(-1)
    shift = torch.tensor([[-0.7], [-0.7], [0.7], [0.7], [0.0], [1.2]], dtype=torch.float64)
    if constant:
        surplus = torch.tensor([[1.0], [-0.5], [2.0], [-1.5], [0.7], [-0.9]], dtype=torch.float64).expand(6, length)
    return Batch((old + shift + 0.4 * noise).requires_grad_(), old, surplus, mask, turns)


AGGREGATIONS: dict[str, Callable[[Tensor, Totals], Tensor]] = {
    "token_mean": policy.token_mean,
    "sequence_mean": policy.sequence_mean,
    "constant": partial(policy.constant, length=12),
    "sequence_sum": policy.sequence_sum,
}
SEGMENTS: dict[str, Callable[[Batch], Tensor]] = {
    "token": lambda batch: torch.arange(batch.mask.shape[1]).expand_as(batch.mask),
    "turn": lambda batch: batch.turns,
    "sequence": lambda batch: torch.zeros_like(batch.turns),
}


def level_of(name: str, batch: Batch) -> Level:
    if name == "turn":
        return partial(policy.turn_level, turns=batch.turns)
    return {"token": policy.token_level, "sequence": policy.sequence_level}[name]


def naive_ratio(batch: Batch, segments: Tensor) -> Tensor:
    """The exponential of the mean of log π − log π_old over each segment, with its graph; 1 outside of the mask."""
    rows = []
    for b in range(len(batch.mask)):
        row = []
        for t in range(batch.mask.shape[1]):
            same = batch.mask[b] & (segments[b] == segments[b, t])
            inside = bool(batch.mask[b, t])
            row.append((batch.logps - batch.old_logps)[b, same].mean().exp() if inside else batch.logps.new_ones(()))
        rows.append(torch.stack(row))
    return torch.stack(rows)


def gradient(batch: Batch, loss: Tensor) -> Tensor:
    return torch.autograd.grad(loss, batch.logps)[0]


def loss_line(batch: Batch, weights: Tensor, gate: Gate, level: Level) -> Tensor:
    return policy.policy_loss(batch.logps, batch.old_logps, batch.advantages, batch.mask, weights, gate, level)


def totals_of(mask: Tensor) -> Totals:
    return Totals(float(mask.sum()), len(mask))


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
    weights = policy.sequence_mean(batch.mask, totals_of(batch.mask))
    truth = gradient(batch, loss_line(batch, weights, policy.reinforce, level_of(level, batch)))
    for gate in GATES.values():
        equal(gradient(batch, loss_line(batch, weights, gate, level_of(level, batch))), truth, 1e-15)
    assert (truth[batch.mask] != 0).all()


def test_at_ratio_one_and_a_constant_advantage_every_level_is_the_same_algorithm() -> None:
    batch = make_batch(0, constant=True)
    batch = batch._replace(old_logps=batch.logps.detach())
    weights = policy.sequence_mean(batch.mask, totals_of(batch.mask))
    truth = gradient(batch, -(weights * batch.advantages * batch.logps).sum())
    for level, gate in itertools.product(SEGMENTS, GATES.values()):
        equal(gradient(batch, loss_line(batch, weights, gate, level_of(level, batch))), truth, 1e-15)


@pytest.mark.parametrize("name", GATES)
def test_the_value_is_the_coefficient_form_itself(name: str) -> None:
    """−Σ w c A log π, and not the surrogate's value, as the module says."""
    batch = make_batch(1)
    weights = policy.token_mean(batch.mask, totals_of(batch.mask))
    ratio = (batch.logps - batch.old_logps).exp().detach()
    terms = weights * GATES[name](ratio, batch.advantages) * batch.advantages * batch.logps
    loss = loss_line(batch, weights, GATES[name], policy.token_level)
    equal(loss.detach(), -terms[batch.mask].sum().detach(), 1e-14)


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("level", SEGMENTS)
@pytest.mark.parametrize("name", GATES)
def test_what_stands_outside_of_the_mask_does_not_matter(name: str, level: str, garbage: float) -> None:
    """In log-probabilities old and new and in advantages; neither the value nor any gradient knows of it."""
    clean = make_batch(2)
    weights = policy.sequence_mean(clean.mask, totals_of(clean.mask))
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
    weights = policy.token_mean(batch.mask, totals_of(batch.mask))
    truth = gradient(batch, loss_line(batch, weights, GATES["clipped"], level_of(level, batch)))
    hanging = batch._replace(advantages=batch.advantages + batch.logps - batch.logps.detach())
    assert hanging.advantages.requires_grad
    equal(gradient(hanging, loss_line(hanging, weights, GATES["clipped"], level_of(level, batch))), truth, 1e-15)


RATIOS = [0.5, 0.8, 1.0, 1.2, 1.5, 4.0]
TABLE: dict[str, tuple[Gate, list[float], list[float]]] = {  # coefficients where A > 0, and where A < 0
    "reinforce": (policy.reinforce, [1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]),
    "importance": (policy.importance, RATIOS, RATIOS),
    "ppo": (partial(policy.clipped, low=0.8, high=1.2), [0.5, 0.8, 1, 1.2, 0, 0], [0, 0.8, 1, 1.2, 1.5, 4]),
    "dual": (partial(policy.clipped, low=0.8, high=1.2, dual=3.0), [0.5, 0.8, 1, 1.2, 0, 0], [0, 0.8, 1, 1.2, 1.5, 0]),
    "dapo": (partial(policy.clipped, low=0.8, high=1.5), [0.5, 0.8, 1, 1.2, 1.5, 0], [0, 0.8, 1, 1.2, 1.5, 4]),
    "cispo": (partial(policy.cispo, low=0.8, high=1.2), [0.8, 0.8, 1, 1.2, 1.2, 1.2], [0.8, 0.8, 1, 1.2, 1.2, 1.2]),
    "cispo, no lower": (
        partial(policy.cispo, low=0.0, high=3.0),
        [0.5, 0.8, 1, 1.2, 1.5, 3],
        [0.5, 0.8, 1, 1.2, 1.5, 3],
    ),
    "gppo": (partial(policy.gppo, low=0.8, high=1.2), [0.5, 0.8, 1, 1.2, 1.2, 1.2], [0.8, 0.8, 1, 1.2, 1.5, 4]),
    "gppo dual": (
        partial(policy.gppo, low=0.8, high=1.2, dual=3.0),
        [0.5, 0.8, 1, 1.2, 1.2, 1.2],
        [0.8, 0.8, 1, 1.2, 1.5, 0],
    ),
    "ce-gppo": (
        partial(policy.gppo, low=0.8, high=1.2, low_scale=0.5, high_scale=0.75),
        [0.5, 0.8, 1, 1.2, 0.9, 0.9],
        [0.4, 0.8, 1, 1.2, 1.5, 4],
    ),
    "aepo": (  # GPPO above, PPO below
        partial(policy.gppo, low=0.8, high=1.2, low_scale=0.0),
        [0.5, 0.8, 1, 1.2, 1.2, 1.2],
        [0, 0.8, 1, 1.2, 1.5, 4],
    ),
    # r sech²(τ (r − 1) / 2) with τ = 1 and τ = 2: sech²(¼) = 0.9400, sech²(½) = 0.7864, sech²(1.5) = 0.1807 and so on
    "sapo": (
        partial(policy.sapo, tau_pos=1.0, tau_neg=2.0),
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
        ours, theirs = policy.gppo(ratio, surplus, 0.8, 1.2), policy.cispo(ratio, surplus, 0.8, 1.2)
        assert (ours != theirs)[0].tolist() == differs


# ---- levels and aggregations ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", SEGMENTS)
def test_the_ratio_is_a_geometric_mean(level: str) -> None:
    batch = make_batch(3)
    ratio = policy.importance_ratio(batch.logps, batch.old_logps, batch.mask, level_of(level, batch))
    truth = naive_ratio(batch, SEGMENTS[level](batch)).detach()
    equal(ratio[batch.mask], truth[batch.mask], 1e-14)
    assert not ratio.requires_grad
    dirty = batch.logps.detach().masked_fill(~batch.mask, torch.nan)
    assert torch.equal(policy.importance_ratio(dirty, batch.old_logps, batch.mask, level_of(level, batch)), ratio)


def test_one_turn_is_a_sequence_and_turns_of_one_token_are_tokens() -> None:
    batch = make_batch(4)
    values = batch.logps.detach()
    whole = policy.turn_level(values, batch.mask, torch.zeros_like(batch.turns))
    equal(whole, policy.sequence_level(values, batch.mask), 1e-15)
    each = policy.turn_level(values, batch.mask, torch.arange(12).expand(6, 12).contiguous())
    assert torch.equal(each[batch.mask], values[batch.mask])


def test_aggregations_against_loops() -> None:
    """And each makes a mean, or a sum, of a constant loss what its name says."""
    mask = make_batch(5).mask
    mask[2] = False  # a completion with no token counts as a sequence, and divides by nothing
    totals = Totals(tokens=64, sequences=8)  # powers of two: float32 has them exactly
    lengths = [int(row.sum()) for row in mask]
    for b, t in itertools.product(range(6), range(12)):
        inside = float(mask[b, t])
        assert policy.token_mean(mask, totals)[b, t] == inside / 64
        assert policy.sequence_sum(mask, totals)[b, t] == inside / 8
        assert policy.constant(mask, totals, length=16)[b, t] == inside / 8 / 16
        assert policy.sequence_mean(mask, totals)[b, t] == pytest.approx(inside / max(lengths[b], 1) / 8, rel=1e-6)
    own = Totals(tokens=sum(lengths), sequences=6)
    assert float(policy.token_mean(mask, own).sum()) == pytest.approx(1)
    assert float(policy.sequence_mean(mask, own).sum()) == pytest.approx(5 / 6)
    assert float(policy.sequence_sum(mask, own).sum()) == pytest.approx(sum(lengths) / 6)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_gradient_does_not_depend_on_how_a_step_is_split(aggregation: str) -> None:
    """Three micro-batches, or processes, of two rows each, averaged: their totals are a third of all counts."""
    batch = make_batch(6)
    aggregate = AGGREGATIONS[aggregation]
    whole = totals_of(batch.mask)
    truth = gradient(batch, loss_line(batch, aggregate(batch.mask, whole), GATES["clipped"], policy.token_level))
    found = torch.zeros_like(truth)
    for rows in (slice(0, 2), slice(2, 4), slice(4, 6)):
        part = Batch(*(x[rows] for x in batch))
        weights = aggregate(part.mask, Totals(whole.tokens / 3, whole.sequences / 3))
        found += gradient(batch, loss_line(part, weights, GATES["clipped"], policy.token_level)) / 3
    equal(found, truth, 1e-7)  # weights are float32
    assert len(set(batch.mask.sum(-1).tolist())) > 1
