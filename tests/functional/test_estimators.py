"""Token estimators on a problem of one token, where every expectation can be enumerated."""

import pytest
import torch
from torch import Tensor

from grade_lightning.errors import InputError
from grade_lightning.estimators import Gumbel, ReinMax, ReinMaxRao, StraightThrough, TokenEstimator
from grade_lightning.functional.estimators import (
    midpoint,
    reinmax,
    reinmax_rao,
    softmax_vjp,
    straight_through,
    straight_through_gumbel,
)
from grade_lightning.functional.gumbel import exponential_noise, posterior_scores, relaxed_tokens

V = 6
ESTIMATORS = [StraightThrough(), Gumbel(), Gumbel(draws=4), ReinMax(), ReinMaxRao()]


class Problem:
    """A distribution over V tokens and a quadratic reward f(x) = xᵀA x + cᵀx of the one-hot token."""

    def __init__(self, quadratic: float) -> None:
        torch.manual_seed(2)
        self.logits = torch.randn(V, dtype=torch.float64)
        self.matrix = quadratic * torch.randn(V, V, dtype=torch.float64)
        self.linear = torch.randn(V, dtype=torch.float64)
        self.logps = self.logits.log_softmax(-1)
        self.tokens = torch.arange(V)
        self.adjoints = self.matrix + self.matrix.T + self.linear  # row y: ∇f at one-hot y

    def truth(self) -> Tensor:
        """∇ Σ_y p_y f(one-hot y), by autograd over all tokens."""
        logits = self.logits.clone().requires_grad_()
        (logits.softmax(-1) * (self.matrix.diagonal() + self.linear)).sum().backward()
        assert logits.grad is not None
        return logits.grad

    def expected(self, cotangents: Tensor) -> Tensor:
        return self.logps.exp() @ cotangents

    @property
    def rows(self) -> Tensor:
        return self.logps.expand(V, V)


def test_reinmax_is_exact_for_a_quadratic_reward() -> None:
    """Heun's rule integrates the linear gradient of a quadratic exactly; straight-through (Euler) does not."""
    problem = Problem(quadratic=1.0)
    found = problem.expected(reinmax(problem.rows, problem.tokens, problem.adjoints))
    torch.testing.assert_close(found, problem.truth(), rtol=0, atol=1e-12)
    euler = problem.expected(straight_through(problem.rows, problem.adjoints))
    assert (euler - problem.truth()).norm() > 0.1 * problem.truth().norm()


def test_straight_through_is_exact_for_a_linear_reward() -> None:
    problem = Problem(quadratic=0.0)
    found = problem.expected(straight_through(problem.rows, problem.adjoints))
    torch.testing.assert_close(found, problem.truth(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("tau", [0.3, 1.0, 2.0])
def test_straight_through_is_autograd_through_softmax(tau: float) -> None:
    problem = Problem(1.0)
    logits = problem.logits.clone().requires_grad_()
    relaxed = (logits.log_softmax(-1) / tau).softmax(-1).expand(V, V)
    for y in range(V):
        (truth,) = torch.autograd.grad(relaxed[y] @ problem.adjoints[y], logits, retain_graph=True)
        found = straight_through(problem.logps, problem.adjoints[y], tau)
        torch.testing.assert_close(found, truth, rtol=0, atol=1e-14)


@pytest.mark.parametrize("tau", [0.3, 1.0, 2.0])
def test_gumbel_is_autograd_through_the_relaxed_token_at_constant_noise(tau: float) -> None:
    """∂/∂logits of the mean over draws of ⟨softmax((log_softmax(logits) + noise) / τ), a⟩."""
    torch.manual_seed(0)
    problem = Problem(1.0)
    draws = torch.stack(
        [posterior_scores(problem.rows, problem.tokens, exponential_noise(problem.rows)) for _ in range(3)]
    )
    logits = problem.logits.clone().requires_grad_()
    noise = draws - problem.logps
    relaxed = ((logits.log_softmax(-1) + noise) / tau).softmax(-1)
    found = straight_through_gumbel(relaxed_tokens(draws, tau), problem.adjoints, tau)
    for y in range(V):
        value = (relaxed[:, y] @ problem.adjoints[y]).mean()
        (truth,) = torch.autograd.grad(value, logits, retain_graph=True)
        torch.testing.assert_close(found[y], truth, rtol=0, atol=1e-14)


def test_reinmax_is_two_vjps() -> None:
    """2 J(π_D)a − ½ J(p)a by autograd: J(q)a is the gradient of ⟨softmax(z), a⟩ at z = log q."""
    problem, tau = Problem(1.0), 0.7
    for y in range(V):
        one_hot = torch.nn.functional.one_hot(torch.tensor(y), V)
        middle = ((problem.logps / tau).softmax(-1) + one_hot) / 2
        parts = []
        for probs in (middle, problem.logps.exp()):
            logits = probs.log().requires_grad_()
            (part,) = torch.autograd.grad(logits.softmax(-1) @ problem.adjoints[y], logits)
            parts.append(part)
        found = reinmax(problem.logps, torch.tensor(y), problem.adjoints[y], tau)
        torch.testing.assert_close(found, 2 * parts[0] - parts[1] / 2, rtol=0, atol=1e-14)


def test_gumbel_rao_keeps_the_expectation_of_the_published_estimator() -> None:
    """E over y and restored noise equals E over fresh noise with y its argmax, to four standard errors."""
    torch.manual_seed(4)
    problem, tau, size = Problem(1.0), 0.8, 40_000
    logps = problem.logps.expand(size, V)

    fresh = logps - exponential_noise(logps).log()
    published = softmax_vjp((fresh / tau).softmax(-1), problem.adjoints[fresh.argmax(-1)]) / tau

    tokens = torch.multinomial(problem.logps.exp(), size, replacement=True)
    draws = torch.stack([posterior_scores(logps, tokens, exponential_noise(logps)) for _ in range(4)])
    rao = straight_through_gumbel(relaxed_tokens(draws, tau), problem.adjoints[tokens], tau)

    error = ((published.var(0) + rao.var(0)) / size).sqrt()
    assert ((published.mean(0) - rao.mean(0)).abs() < 4 * error).all()
    assert rao.var(0).sum() < 0.9 * published.var(0).sum()


def test_gumbel_rao_divides_the_variance_given_the_token_by_the_draws() -> None:
    torch.manual_seed(5)
    problem, tau, size = Problem(1.0), 0.8, 10_000
    logps, tokens = problem.logps.expand(size, V), torch.full((size,), 1)
    traces = []
    for draws in (1, 8):
        traces.append(Gumbel(draws).cotangent(logps, tokens, problem.adjoints[tokens], tau).var(0).sum())
    assert 7 < traces[0] / traces[1] < 9


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: f"{type(e).__name__}{getattr(e, 'draws', '')}")
def test_estimators_are_linear_and_spare_masked_tokens(estimator: TokenEstimator) -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, V, dtype=torch.float64)
    logits[..., 4:] = -torch.inf
    tokens = torch.tensor([[0, 1, 2], [3, 0, 1]])

    def backward(adjoint: torch.Tensor) -> torch.Tensor:
        return estimator.cotangent(logits, tokens, adjoint, 0.7, torch.Generator().manual_seed(0))

    a, b = torch.randn(2, 2, 3, V, dtype=torch.float64)
    torch.testing.assert_close(backward(2 * a - 3 * b), 2 * backward(a) - 3 * backward(b), rtol=0, atol=1e-13)
    assert (backward(a)[..., 4:] == 0).all()
    assert backward(a)[..., :4].abs().min() > 0
    torch.testing.assert_close(backward(a).sum(-1), torch.zeros(2, 3, dtype=torch.float64), rtol=0, atol=1e-13)


def test_the_classes_are_the_functions() -> None:
    torch.manual_seed(0)
    logps, tokens, tau = torch.randn(2, 3, V).log_softmax(-1), torch.randint(V, (2, 3)), 0.7
    a = torch.randn(2, 3, V)
    assert torch.equal(StraightThrough().cotangent(logps, tokens, a, tau), straight_through(logps, a, tau))
    assert torch.equal(ReinMax().cotangent(logps, tokens, a, tau), reinmax(logps, tokens, a, tau))
    torch.manual_seed(1)
    found = Gumbel(draws=2).cotangent(logps, tokens, a, tau)
    torch.manual_seed(1)
    draws = torch.stack([posterior_scores(logps, tokens, exponential_noise(logps)) for _ in range(2)])
    torch.testing.assert_close(found, straight_through_gumbel(relaxed_tokens(draws, tau), a, tau))


def test_reinmax_rao_is_autograd_at_the_midpoint_with_constant_noise() -> None:
    """2 ∇⟨softmax((θ + noise) / τ), a⟩ at θ = log π_D, less ½ J(p) a."""
    torch.manual_seed(0)
    problem, tau = Problem(1.0), 0.7
    for y in range(V):
        middle = midpoint(problem.logps, problem.tokens[y]).log().requires_grad_()
        scores = posterior_scores(middle.detach(), problem.tokens[y], exponential_noise(problem.logps))
        noise = scores - middle.detach()
        value = ((middle.log_softmax(-1) + noise) / tau).softmax(-1) @ problem.adjoints[y]
        (first,) = torch.autograd.grad(value, middle)
        truth = 2 * first - softmax_vjp(problem.logps.exp(), problem.adjoints[y]) / 2
        found = reinmax_rao(problem.logps, relaxed_tokens(scores, tau).unsqueeze(0), problem.adjoints[y], tau)
        torch.testing.assert_close(found, truth, rtol=0, atol=1e-13)


def test_reinmax_rao_has_less_variance_than_reinmax_and_is_divided_by_its_draws() -> None:
    torch.manual_seed(5)
    problem, size = Problem(1.0), 20_000
    logps, tokens = problem.logps.expand(size, V), torch.multinomial(problem.logps.exp(), size, replacement=True)
    adjoints = problem.adjoints[tokens]
    plain, rao = (e.cotangent(logps, tokens, adjoints, 1.0).var(0).sum() for e in (ReinMax(), ReinMaxRao(draws=20)))
    assert rao < 0.9 * plain
    token = torch.full((size,), 1)
    one, eight = (ReinMaxRao(k).cotangent(logps, token, problem.adjoints[token], 1.0).var(0).sum() for k in (1, 8))
    assert 7 < one / eight < 9


def test_gumbel_needs_a_draw() -> None:
    with pytest.raises(InputError, match="draws = 0"):
        Gumbel(draws=0)
