"""The KL as an object: what it refuses, what it warns of, and which of its choices have the gradient of the KL."""

import math
import warnings
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from grade_lightning.advantages import Baseline
from grade_lightning.errors import InputError
from grade_lightning.functional import advantages
from grade_lightning.functional.aggregation import Normalizers, sequence_sum
from grade_lightning.functional.divergences import categorical_kl
from grade_lightning.functional.gates import reinforce
from grade_lightning.functional.losses import policy_loss
from grade_lightning.functional.ratios import token_level
from grade_lightning.kl import KL, Credit, Estimator, Placement
from grade_lightning.methods import Reinforce
from grade_lightning.records import Experience, Rollout, Scores, TokenStats
from grade_lightning.rollouts import Sampler
from grade_lightning.terms import Graphs, KLLoss, PolicyLoss
from tests.conftest import make_tokenizer
from tests.functional.problems import Problem, cosine, ends, equal

ALL = [(e, p, c) for e in get_args(Estimator) for p in get_args(Placement) for c in get_args(Credit)]
FAULTY = [("k1", "loss"), ("k2", "reward"), ("k3", "reward"), ("full", "reward")]
BETA = 0.5


def make(beta: float, estimator: Estimator, placement: Placement, credit: Credit) -> KL:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return KL(beta, estimator, placement, credit)


# ---- the object -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"beta": -0.1}, r"kl\.beta = -0\.1"),
        ({"beta": math.nan}, r"kl\.beta = nan"),
        ({"beta": math.inf}, r"kl\.beta = inf"),
        ({"beta": 0.1, "target": 0.0}, r"kl\.target"),
        ({"beta": 0.1, "target": -1.0}, r"kl\.target"),
        ({"beta": 0.0, "target": 5.0}, r"kl\.target"),
        ({"beta": 0.1, "target": 5.0, "horizon": 0}, r"kl\.horizon = 0"),
        ({"beta": 0.1, "target": 5.0, "rate": 0.0}, r"kl\.rate = 0\.0"),
        ({"beta": 0.1, "rate": 0.1}, r"kl\.rate: needs a kl\.target"),
    ],
)
def test_numbers_that_cannot_work(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(InputError, match=name):
        KL(**settings)


@pytest.mark.parametrize(("estimator", "placement", "credit"), ALL)
def test_a_choice_that_restrains_nothing_is_named(estimator: Estimator, placement: Placement, credit: Credit) -> None:
    """The estimator and what is wrong; nothing is said of the others, nor where β is 0."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        KL(0.0, estimator, placement, credit)
        if (estimator, placement) not in FAULTY:
            assert KL(0.1, estimator, placement, credit).fault is None
            return
    wrong = "expected gradient of 0" if estimator == "k1" else "leaves out its own gradient"
    with pytest.warns(UserWarning, match=f"kl: {estimator} in the {placement}.*{wrong}"):
        KL(0.1, estimator, placement, credit)


def test_where_it_acts() -> None:
    places = {
        p: (make(0.1, "k3", p, "token").in_reward, make(0.1, "k3", p, "token").in_loss) for p in get_args(Placement)
    }
    assert places == {"reward": (True, False), "loss": (False, True), "both": (True, True)}
    assert not any((KL(0.0, "k3", "both").in_reward, KL(0.0, "k3", "both").in_loss))


@pytest.mark.parametrize("kl", [0.0, 1.0, 4.5, 5.0, 5.5, 6.5, 1000.0])
@pytest.mark.parametrize("completions", [1, 40, 100, 5000])
def test_adaptive_beta_is_ziegler_s(kl: float, completions: int) -> None:
    """β (1 + clip(KL / target − 1, ±0.2) n / horizon); never more than 20 % in one go."""
    error = kl / 5.0 - 1
    error = -0.2 if error < -0.2 else 0.2 if error > 0.2 else error
    share = completions / 100 if completions < 100 else 1.0
    found = KL(0.1, target=5.0, horizon=100).adapted(0.3, kl, completions)
    assert found == pytest.approx(0.3 * (1 + error * share), rel=1e-12)
    assert 0.8 * 0.3 <= found <= 1.2 * 0.3 + 1e-12


def test_adaptive_beta_settles_where_the_kl_is_the_target() -> None:
    """A KL that falls as β rises is brought to the target from either side; without a target β stays."""
    for start in (0.001, 10.0):
        kl, beta = KL(start, target=5.0, horizon=100), start
        for _ in range(300):
            beta = kl.adapted(beta, 2.0 / beta, completions=50)
        assert beta == pytest.approx(0.4, rel=1e-3)
    assert KL(0.1).adapted(0.1, 1e6, 1000) == 0.1


def test_with_a_rate_the_target_is_a_bound() -> None:
    """β moves by the nats beyond it, from 0 and back to 0, and acts although it begins there."""
    kl = KL(0.0, target=5.0, rate=0.1)
    assert kl.in_reward
    assert kl.adapted(0.0, 7.0, 1) == pytest.approx(0.2)
    assert kl.adapted(0.2, 4.0, 1000) == pytest.approx(0.1)
    assert kl.adapted(0.2, 1.0, 1) == 0.0
    assert kl.adapted(0.2, math.nan, 1) == 0.2


def naive(estimator: Estimator, d: float) -> float:
    return {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d, "full": d}[estimator]


@pytest.mark.parametrize(("estimator", "placement", "credit"), ALL)
def test_the_penalty_is_the_estimate_of_a_token_or_of_the_whole(
    estimator: Estimator, placement: Placement, credit: Credit
) -> None:
    """With credit by token at each token, by sequence all at the last; no graph, and nothing of the padding."""
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    log_ratio = torch.tensor([[0.5, -1.0, 2.0, torch.nan], [0.3, torch.inf, 1.0, 7.0]]).requires_grad_()
    exact = torch.tensor([[0.1, 0.2, 0.3, torch.nan], [0.4, 9.0, 9.0, 9.0]]).requires_grad_()
    rows = [[0.1, 0.2, 0.3], [0.4]] if estimator == "full" else [[0.5, -1.0, 2.0], [0.3]]
    truth = torch.zeros(2, 4)
    for b, row in enumerate(rows):
        if credit == "token":
            truth[b, : len(row)] = torch.tensor([naive(estimator, d) for d in row])
        else:
            truth[b, len(row) - 1] = naive(estimator, sum(row))
    found = make(BETA, estimator, placement, credit).penalty(log_ratio, exact, mask)
    assert not found.requires_grad
    torch.testing.assert_close(found, truth)


# ---- its gradient, over all completions -----------------------------------------------------------------------------


def ascent(problem: Problem, kl: KL, reward: float = 1.0, row: int | None = None) -> Tensor:
    """Expected direction of ascent of E R − β KL, composed as policy gradients do; or one completion's."""
    logits = problem.leaf()
    now, mask, weights = problem.measure(logits), problem.mask, problem.weights()
    if row is not None:
        weights = mask.double() * (torch.arange(len(mask)) == row).unsqueeze(1)
    rewards = reward * problem.rewards
    penalty = -kl.beta * kl.penalty(now.log_ratio, now.kl, mask) * kl.in_reward
    if kl.credit == "sequence":
        rewards, penalty = rewards + penalty.sum(-1), torch.zeros_like(penalty)
    surplus = rewards.unsqueeze(1) + advantages.discounted_returns(penalty, mask)
    loss = policy_loss(now.logps, now.logps.detach(), surplus, mask, weights, reinforce, token_level)
    if kl.in_loss:
        loss = loss + kl.beta * kl.loss(now.logps, now.log_ratio, now.kl, mask, weights)
    return -torch.autograd.grad(loss, logits)[0]


UNBIASED: list[tuple[Estimator, Placement, Credit]] = [
    ("k1", "reward", "token"),
    ("k1", "reward", "sequence"),
    ("k1", "both", "token"),
    ("k1", "both", "sequence"),
    ("k2", "loss", "sequence"),
    ("k3", "both", "token"),
    ("k3", "both", "sequence"),
    ("full", "loss", "sequence"),
    ("full", "both", "token"),
    ("full", "both", "sequence"),
]


@ends
@pytest.mark.parametrize(("estimator", "placement", "credit"), UNBIASED)
def test_unbiased(ends: bool, estimator: Estimator, placement: Placement, credit: Credit) -> None:
    """E R − β KL(π‖π_ref) of whole completions, to ten digits; β counts once in the reward and once in the loss."""
    problem = Problem(ends)
    equal(ascent(problem, make(BETA, estimator, placement, credit)), problem.truth(beta=BETA))
    assert (problem.truth(beta=BETA) - problem.truth()).norm() > 0.1


def bias(problem: Problem, estimator: Estimator, placement: Placement, credit: Credit) -> tuple[float, float]:
    """Cosine to the KL's gradient and ratio of the norms; there is no reward."""
    found, truth = ascent(problem, make(BETA, estimator, placement, credit), 0.0), problem.truth(0.0, BETA)
    return cosine(found, truth), float(found.norm() / truth.norm())


@ends
@pytest.mark.parametrize("credit", get_args(Credit))
def test_k1_in_the_loss_restrains_nothing(ends: bool, credit: Credit) -> None:
    """Its expected gradient is exactly 0, whatever β: what is left is the reward's."""
    problem = Problem(ends)
    equal(ascent(problem, make(100.0, "k1", "loss", credit)), problem.truth(), 1e-12)
    assert problem.truth(0.0, 1.0).norm() > 0.1


@ends
def test_losses_of_single_tokens_leave_out_what_a_token_leads_to(ends: bool) -> None:
    """k2 and the exact KL have the same expectation, close to the KL's gradient, and no closer; k3 is farther off."""
    problem = Problem(ends)
    estimators: list[Estimator] = ["k2", "full", "k3"]
    k2, exact, k3 = (ascent(problem, make(BETA, e, "loss", "token"), 0.0) for e in estimators)
    equal(k2, exact, 1e-14)
    truth = problem.truth(0.0, BETA)
    assert 0.95 < cosine(k2, truth) < 0.995
    assert 0.9 < cosine(k3, truth) < cosine(k2, truth) - 0.01
    assert (k2 - truth).norm() > 0.1 * truth.norm()
    for credit in get_args(Credit):
        assert bias(problem, "k3", "loss", credit)[0] < 0.99


def test_of_one_token_there_is_nothing_it_leads_to() -> None:
    """k2 and the exact KL in the loss are then exact with either credit; k3 still is another divergence's."""
    problem = Problem(ends=False, length=1)
    choices: list[tuple[Estimator, Credit]] = [
        ("k2", "token"),
        ("k2", "sequence"),
        ("full", "token"),
        ("full", "sequence"),
    ]
    for estimator, credit in choices:
        equal(ascent(problem, make(BETA, estimator, "loss", credit)), problem.truth(beta=BETA), 1e-12)
    pi, ref = problem.logits.softmax(-1), problem.ref_logits.softmax(-1)
    equal(ascent(problem, make(BETA, "k3", "loss", "token"), 0.0), -BETA * (pi - ref), 1e-12)


@ends
def test_k3_of_whole_completions_in_the_loss_is_the_forward_kl_s(ends: bool) -> None:
    """∇KL(π_ref‖π), exactly; with credit by token it is that of each token alone, in prefixes that π sampled."""
    problem = Problem(ends)
    logits, ref = problem.leaf(), problem.probs(problem.ref_logits)
    (truth,) = torch.autograd.grad(BETA * (ref * problem.probs(logits).log()).sum(), logits)
    equal(ascent(problem, make(BETA, "k3", "loss", "sequence"), 0.0), truth, 1e-12)
    assert cosine(ascent(problem, make(BETA, "k3", "loss", "token"), 0.0), truth) < 0.9999


@ends
def test_the_exact_kl_with_its_score_term_has_the_least_noise(ends: bool) -> None:
    """Of all unbiased choices: a fifth, or less, of the variance of k1 in the reward, which in both is larger."""
    problem = Problem(ends)
    probs = problem.probs(problem.logits)
    noise: dict[tuple[str, str, str], float] = {}
    for choice in UNBIASED:
        kl = make(BETA, *choice)
        each = torch.stack([ascent(problem, kl, 0.0, row) for row in range(len(probs))]).flatten(1)
        noise[choice] = (probs @ (each - probs @ each).square()).sum().item()
    assert min(noise, key=lambda choice: noise[choice]) == ("full", "loss", "sequence")
    for credit in get_args(Credit):
        assert noise["full", "loss", "sequence"] < 0.2 * noise["k1", "reward", credit]
        assert noise["k1", "both", credit] > noise["k1", "reward", credit]


@ends
@pytest.mark.parametrize("credit", get_args(Credit))
@pytest.mark.parametrize("estimator", ["k2", "k3", "full"])
def test_squares_in_the_reward_alone_point_elsewhere(ends: bool, estimator: Estimator, credit: Credit) -> None:
    """Low cosines to the KL's gradient; near the reference what they do vanishes beside it."""
    angle, length = bias(Problem(ends), estimator, "reward", credit)
    assert abs(angle) < 0.6
    assert length < 0.5
    assert bias(Problem(ends, shift=0.07), estimator, "reward", credit)[1] < 0.06
    assert bias(Problem(ends, shift=0.007), estimator, "reward", credit)[1] < 0.006


@ends
@pytest.mark.parametrize("credit", get_args(Credit))
def test_k2_in_both_is_the_gradient_of_its_own_expectation(ends: bool, credit: Credit) -> None:
    """Of E ½ d², summed after or before squaring: of a divergence, but not of the KL."""
    problem = Problem(ends)
    logits = problem.leaf()
    log_ratio = problem.measure(logits).log_ratio * problem.mask
    each = log_ratio.square().sum(-1) if credit == "token" else log_ratio.sum(-1).square()
    (truth,) = torch.autograd.grad(-BETA * (problem.probs(logits) * each / 2).sum(), logits)
    found = ascent(problem, make(BETA, "k2", "both", credit), 0.0)
    equal(found, truth, 1e-12)
    assert cosine(found, problem.truth(0.0, BETA)) < 0.9999


class Enumerated(Reinforce):
    """REINFORCE itself on a table of logits; the mean over completions is the expectation."""

    def __init__(self, problem: Problem, kl: KL) -> None:
        super().__init__(kl=kl, sampler=Sampler(max_new_tokens=3))
        self.problem = problem
        self.table = problem.leaf()
        assert isinstance(self.advantage, Baseline)
        self.advantage.average = 0.3
        for term in self.terms:
            assert isinstance(term, PolicyLoss | KLLoss)
            term.aggregate = self.expectation

    def expectation(self, mask: Tensor, normalizers: Normalizers) -> Tensor:
        return sequence_sum(mask, normalizers) * self.problem.probs(self.problem.logits).unsqueeze(1)

    def measure(self, rollout: Rollout, known: TokenStats | None = None, graphs: Graphs = "log_ratio") -> TokenStats:
        found = self.problem.measure(self.table)
        return found if graphs == "kl" else replace(found, kl=found.kl.detach())


@pytest.mark.parametrize(("estimator", "placement", "credit"), ALL)
def test_the_module_composes_it_so(estimator: Estimator, placement: Placement, credit: Credit) -> None:
    """The whole path of a policy gradient: what the tests above claim of their composition holds of its."""
    problem, kl = Problem(ends=True), make(BETA, estimator, placement, credit)
    prompts = torch.zeros(len(problem.tokens), 1, dtype=torch.long)
    rollout = Rollout(prompts, prompts + 1, problem.tokens, problem.mask, None, make_tokenizer())
    module = Enumerated(problem, kl)
    once = Normalizers(tokens=1, sequences=1)
    step = module.loss(Experience(rollout, Scores(problem.rewards, {}), beta=kl.beta, normalizers=once))
    equal(-torch.autograd.grad(step.loss, module.table)[0], ascent(problem, kl), 1e-12)


# ---- far from the reference -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("credit", get_args(Credit))
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_no_clamp_kills_the_gradient_of_a_huge_log_ratio(estimator: Estimator, credit: Credit) -> None:
    """1, d and 1 − e^−d, in float32 as far as float32 goes: the pull back does not end where it is needed most."""
    for d in (-80.0, -30.0, -12.0, 12.0, 30.0, 80.0, 500.0):
        log_ratio = torch.tensor([[d, torch.nan]], requires_grad=True)
        mask = torch.tensor([[True, False]])
        exact = torch.zeros(1, 2)
        kl = make(BETA, estimator, "both", credit)
        loss = kl.loss(torch.zeros(1, 2), log_ratio, exact, mask, mask.float())
        (found,) = torch.autograd.grad(loss, log_ratio)
        truth = {"k1": 1.0, "k2": d, "k3": 1 - math.exp(-d)}[estimator]
        assert found[0].tolist() == pytest.approx([truth, 0.0], rel=1e-5)
        assert found[0, 0] != 0
        penalty = kl.penalty(log_ratio, exact, mask)
        assert penalty[0].tolist() == pytest.approx([naive(estimator, d), 0.0], rel=1e-5)


@pytest.mark.parametrize("credit", get_args(Credit))
def test_no_clamp_kills_the_gradient_of_a_huge_exact_kl(credit: Credit) -> None:
    """A policy that is nearly certain of a token to which the reference gives e^−200: p (log p/q − KL), finite."""
    logits = torch.tensor([[[8.0, 0.0, 0.0], [1.0, 2.0, 3.0]]], requires_grad=True)
    ref = torch.tensor([-200.0, 0.0, 0.0]).log_softmax(-1).expand(1, 2, 3)
    logps, mask = logits.log_softmax(-1), torch.tensor([[True, False]])
    log_ratio = (logps - ref)[..., 0]
    loss = make(BETA, "full", "loss", credit).loss(
        logps[..., 0], log_ratio, categorical_kl(logps, ref), mask, mask.float()
    )
    assert loss.item() == pytest.approx(200, rel=0.01)
    (found,) = torch.autograd.grad(loss, logits)
    p = torch.tensor([8.0, 0.0, 0.0]).softmax(-1)
    gap = p.log() - ref[0, 0]
    torch.testing.assert_close(found[0, 0], p * (gap - (p * gap).sum()), rtol=1e-3, atol=1e-5)
    assert found[0, 0].abs().min() > 0.05
    assert (found[0, 1] == 0).all()
