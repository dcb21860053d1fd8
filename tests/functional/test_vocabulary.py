"""The pass over the vocabulary by chunks, against the plain computation over all positions at once."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from grade_lightning.functional.divergences import categorical_kl
from grade_lightning.functional.sequences import entropy, token_logps
from grade_lightning.functional.vocabulary import Vocabulary, surrogate

N, H, V, CAP = 7, 4, 11, 3.0
chunked = pytest.mark.parametrize("elements", [1, 2 * V, 3 * V + 1, N * V], ids=["1", "2", "3", "all"])


class Problem:
    """Hidden states, a soft-capped head with a bias, tokens and a reference."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        torch.manual_seed(0)
        self.hidden = torch.randn(N, H, dtype=dtype, requires_grad=True)
        self.weight = torch.randn(V, H, dtype=dtype, requires_grad=True)
        self.bias = torch.randn(V, dtype=dtype, requires_grad=True)
        self.tokens = torch.randint(V, (N,))
        self.reference = torch.randn(N, V, dtype=dtype).log_softmax(-1)
        self.gradient = torch.randn(N, 3, dtype=dtype)

    @staticmethod
    def head(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return CAP * (torch.nn.functional.linear(hidden, weight, bias) / CAP).tanh()

    def vocabulary(self, elements: int | None = None) -> Vocabulary:
        return Vocabulary(self.hidden, self.head, [self.weight, self.bias], V, elements)

    def figures(self, logits: Tensor, rows: slice) -> Tensor:
        logps = logits.log_softmax(-1)
        kl = categorical_kl(logps, self.reference[rows])
        return torch.stack([token_logps(logps, self.tokens[rows]), kl, entropy(logps)], -1)

    def gradients(self, values: Tensor) -> tuple[Tensor, ...]:
        inputs = [x for x in (self.hidden, self.weight, self.bias) if x.requires_grad]
        return torch.autograd.grad(values, inputs, self.gradient.to(values.dtype), retain_graph=True)

    def plain(self) -> Tensor:
        return self.figures(self.head(self.hidden, self.weight, self.bias), slice(0, N))


def same(found: Any, truth: Any) -> None:
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)


@chunked
def test_values_and_gradients_are_those_of_the_plain_computation(elements: int) -> None:
    problem = Problem()
    vocabulary = problem.vocabulary(elements)
    assert vocabulary.whole == (elements >= N * V)
    found = vocabulary.map(problem.figures)
    same(found, problem.plain())
    same(problem.gradients(found), problem.gradients(problem.plain()))


@chunked
def test_gradcheck(elements: int) -> None:
    problem = Problem()

    def mapped(*inputs: Tensor) -> Tensor:
        return Vocabulary(inputs[0], problem.head, inputs[1:], V, elements).map(problem.figures)

    assert torch.autograd.gradcheck(mapped, (problem.hidden, problem.weight, problem.bias))


@chunked
def test_pull_is_the_gradient_at_the_hidden_states(elements: int) -> None:
    problem = Problem()
    weights = torch.randn(N, V, dtype=torch.float64)
    found = problem.vocabulary(elements).pull(lambda logits, rows: logits.square() * weights[rows])
    logits = problem.head(problem.hidden, problem.weight, problem.bias)
    (truth,) = torch.autograd.grad(logits, problem.hidden, logits.detach().square() * weights)
    same(found, truth)
    assert not found.requires_grad


@chunked
def test_a_surrogate_has_the_cotangent_for_its_gradient(elements: int) -> None:
    problem = Problem()
    found = problem.vocabulary(elements).map(surrogate(lambda logits, rows: logits.exp())).sum()
    logits = problem.head(problem.hidden, problem.weight, problem.bias)
    inputs = [problem.hidden, problem.weight, problem.bias]
    same(torch.autograd.grad(found, inputs), torch.autograd.grad(logits, inputs, logits.detach().exp()))


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
@chunked
def test_what_is_frozen_gets_no_gradient_and_costs_none(frozen: str, elements: int) -> None:
    problem = Problem()
    getattr(problem, frozen).requires_grad_(False)
    same(problem.gradients(problem.vocabulary(elements).map(problem.figures)), problem.gradients(problem.plain()))


def test_without_any_gradient_wanted_there_is_no_graph() -> None:
    problem = Problem()
    for tensor in (problem.hidden, problem.weight, problem.bias):
        tensor.requires_grad_(False)
    for elements in (1, N * V):
        assert not problem.vocabulary(elements).map(problem.figures).requires_grad


@chunked
def test_a_tied_weight_gets_both_gradients(elements: int) -> None:
    problem = Problem()
    hidden = problem.weight[problem.tokens].tanh()
    vocabulary = Vocabulary(hidden, problem.head, [problem.weight, problem.bias], V, elements)
    plain = problem.figures(problem.head(hidden, problem.weight, problem.bias), slice(0, N))
    (found,) = torch.autograd.grad(vocabulary.map(problem.figures).sum(), problem.weight, retain_graph=True)
    same(found, torch.autograd.grad(plain.sum(), problem.weight)[0])


def test_hooks_on_parameters_see_the_whole_gradient_once() -> None:
    problem, seen = Problem(), list[Tensor]()
    problem.weight.register_hook(seen.append)
    problem.vocabulary(1).map(problem.figures).sum().backward()
    (whole,) = seen
    same(whole, problem.weight.grad)


@pytest.mark.parametrize("elements", [1, N * V])
def test_logits_are_made_once_where_they_fit(elements: int) -> None:
    """Of the whole they are kept over all passes; of chunks never more than one is there."""
    problem, sizes = Problem(), list[int]()

    def head(hidden: Tensor, *parameters: Tensor) -> Tensor:
        sizes.append(len(hidden))
        return problem.head(hidden, *parameters)

    vocabulary = Vocabulary(problem.hidden, head, [problem.weight, problem.bias], V, elements)
    once = vocabulary.once(lambda logits, rows: logits.exp())
    for _ in range(2):
        vocabulary.pull(once)
        vocabulary.at(slice(2, 3))
    vocabulary.map(problem.figures).sum().backward()
    assert sizes == ([N] if vocabulary.whole else [1] * (2 * (N + 1) + 2 * N))


@chunked
def test_once_is_the_function(elements: int) -> None:
    problem, calls = Problem(), list[slice]()

    def cotangent(logits: Tensor, rows: slice) -> Tensor:
        calls.append(rows)
        return logits.exp()

    vocabulary = problem.vocabulary(elements)
    once = vocabulary.once(cotangent)
    first = vocabulary.pull(once)
    same(vocabulary.pull(once), first)
    same(vocabulary.pull(lambda logits, rows: logits.exp()), first)
    if vocabulary.whole:
        assert len(calls) == 1


def test_a_head_in_bfloat16_adds_its_gradients_up_in_float32() -> None:
    """Many chunks that each add little: a sum in bfloat16 would stop growing at 256 times the addend."""
    count = 2_000
    hidden = torch.ones(count, 1, dtype=torch.bfloat16)
    weight = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    vocabulary = Vocabulary(hidden, torch.nn.functional.linear, [weight], 1, 1)
    vocabulary.map(lambda logits, rows: logits).sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.bfloat16
    assert float(weight.grad) == pytest.approx(count, rel=2**-8)


def test_autocast_is_the_same_in_the_second_pass() -> None:
    problem = Problem(torch.float32)
    kinds = []

    def figures(logits: Tensor, rows: slice) -> Tensor:
        kinds.append(logits.dtype)
        return problem.figures(logits.float(), rows)

    with torch.autocast("cpu", torch.bfloat16):
        found = Vocabulary(problem.hidden, problem.head, [problem.weight, problem.bias], V, 1).map(figures)
    found.sum().backward()
    assert set(kinds) == {torch.bfloat16}
    assert len(kinds) == 2 * N
    assert problem.weight.grad is not None
    assert problem.weight.grad.dtype == torch.float32


def test_chunks_within_a_checkpointed_block() -> None:
    problem = Problem()
    found = checkpoint(
        lambda hidden: problem.vocabulary(2 * V).map(problem.figures), problem.hidden, use_reentrant=False
    )
    assert isinstance(found, Tensor)
    same(problem.gradients(found), problem.gradients(problem.plain()))
