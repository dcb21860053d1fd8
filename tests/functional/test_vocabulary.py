"""The pass over the vocabulary by chunks, against the plain computation over all positions at once."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from grade_lightning.functional.divergences import categorical_kl
from grade_lightning.functional.products import linear
from grade_lightning.functional.sequences import entropy, token_logps
from grade_lightning.functional.vocabulary import Head, Vocabulary, positions_at_once

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

    def figures(self, logits: Tensor, rows: slice) -> Iterator[Tensor]:
        logps = logits.log_softmax(-1)
        yield token_logps(logps, self.tokens[rows])
        yield categorical_kl(logps, self.reference[rows])
        yield entropy(logps)

    def mapped(self, elements: int | None = None) -> Tensor:
        return torch.stack(self.vocabulary(elements).map(self.figures), -1)

    def gradients(self, values: Tensor) -> tuple[Tensor, ...]:
        inputs = [x for x in (self.hidden, self.weight, self.bias) if x.requires_grad]
        return torch.autograd.grad(values, inputs, self.gradient.to(values.dtype), retain_graph=True)

    def plain(self) -> Tensor:
        return torch.stack(list(self.figures(self.head(self.hidden, self.weight, self.bias), slice(0, N))), -1)


def same(found: Any, truth: Any) -> None:
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)


@chunked
def test_values_and_gradients_are_those_of_the_plain_computation(elements: int) -> None:
    problem = Problem()
    found = problem.mapped(elements)
    same(found, problem.plain())
    same(problem.gradients(found), problem.gradients(problem.plain()))


@chunked
def test_gradcheck(elements: int) -> None:
    problem = Problem()

    def mapped(*inputs: Tensor) -> tuple[Tensor, ...]:
        return Vocabulary(inputs[0], problem.head, inputs[1:], V, elements).map(problem.figures)

    assert torch.autograd.gradcheck(mapped, (problem.hidden, problem.weight, problem.bias))


def test_columns_without_a_gradient_are_not_computed_again() -> None:
    problem, asked = Problem(), list[str]()

    def figures(logits: Tensor, rows: slice) -> Iterator[Tensor]:
        for name, column in zip("abc", problem.figures(logits, rows), strict=True):
            asked.append(name)
            yield column

    first, *others = problem.vocabulary(N * V).map(figures, differentiable=1)
    assert [x.requires_grad for x in (first, *others)] == [True, False, False]
    found = torch.autograd.grad(first, problem.hidden, problem.gradient[:, 0])
    assert asked == ["a", "b", "c", "a"]
    same(found, torch.autograd.grad(problem.plain()[:, 0], problem.hidden, problem.gradient[:, 0]))


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
def test_push_has_the_cotangent_for_its_gradient(elements: int) -> None:
    problem = Problem()
    zero, columns = problem.vocabulary(elements).push(
        lambda logits, rows: (logits.exp(), problem.figures(logits, rows))
    )
    assert zero == 0
    assert not any(column.requires_grad for column in columns)
    same(torch.stack(columns, -1), problem.plain().detach())
    logits = problem.head(problem.hidden, problem.weight, problem.bias)
    inputs = [problem.hidden, problem.weight, problem.bias]
    found = torch.autograd.grad(3 * zero, inputs)
    same(found, torch.autograd.grad(logits, inputs, 3 * logits.detach().exp()))


def test_push_gives_its_gradient_once() -> None:
    zero, _ = Problem().vocabulary().push(lambda logits, rows: (logits, []))
    zero.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="make the loss again"):
        zero.backward()


def test_push_without_a_graph_makes_the_columns_alone() -> None:
    problem = Problem()
    with torch.no_grad():
        zero, columns = problem.vocabulary().push(lambda logits, rows: (logits, problem.figures(logits, rows)))
    assert not zero.requires_grad
    same(torch.stack(columns, -1), problem.plain().detach())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@chunked
def test_the_linear_head_adds_up_in_place(elements: int, dtype: torch.dtype, bias: bool) -> None:
    """What it adds up is what torch's own adds up."""
    problem = Problem(dtype)
    parameters = [problem.weight, problem.bias] if bias else [problem.weight]

    def gradients(head: Head) -> tuple[Tensor, ...]:
        columns = Vocabulary(problem.hidden, head, parameters, V, elements).map(problem.figures)
        return torch.autograd.grad(torch.stack(columns).float().sum(), [problem.hidden, *parameters])

    found, truth = gradients(linear), gradients(torch.nn.functional.linear)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    torch.testing.assert_close(found, truth, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
@chunked
def test_what_is_frozen_gets_no_gradient_and_costs_none(frozen: str, elements: int) -> None:
    problem = Problem()
    getattr(problem, frozen).requires_grad_(False)
    same(problem.gradients(problem.mapped(elements)), problem.gradients(problem.plain()))


def test_without_any_gradient_wanted_there_is_no_graph() -> None:
    problem = Problem()
    for tensor in (problem.hidden, problem.weight, problem.bias):
        tensor.requires_grad_(False)
    for elements in (1, N * V):
        assert not problem.mapped(elements).requires_grad


@chunked
def test_a_tied_weight_gets_both_gradients(elements: int) -> None:
    problem = Problem()
    hidden = problem.weight[problem.tokens].tanh()
    vocabulary = Vocabulary(hidden, problem.head, [problem.weight, problem.bias], V, elements)
    plain = problem.figures(problem.head(hidden, problem.weight, problem.bias), slice(0, N))
    found, truth = (
        torch.autograd.grad(torch.stack(list(columns)).sum(), problem.weight, retain_graph=True)[0]
        for columns in (vocabulary.map(problem.figures), plain)
    )
    same(found, truth)


def test_hooks_on_parameters_see_the_whole_gradient_once() -> None:
    problem, seen = Problem(), list[Tensor]()
    problem.weight.register_hook(seen.append)
    problem.mapped(1).sum().backward()
    (whole,) = seen
    same(whole, problem.weight.grad)


def test_never_more_than_a_chunk_is_there() -> None:
    problem, sizes = Problem(), list[int]()

    def head(hidden: Tensor, *parameters: Tensor) -> Tensor:
        sizes.append(len(hidden))
        return problem.head(hidden, *parameters)

    vocabulary = Vocabulary(problem.hidden, head, [problem.weight, problem.bias], V, 2 * V)
    vocabulary.pull(lambda logits, rows: logits.exp())
    vocabulary.push(lambda logits, rows: (logits, []))[0].backward()
    torch.stack(vocabulary.map(problem.figures)).sum().backward()
    assert sizes == [2, 2, 2, 1] * 4


def test_a_head_in_bfloat16_adds_its_gradients_up_in_float32() -> None:
    """Many chunks that each add little: a sum in bfloat16 would stop growing at 256 times the addend."""
    count = 2_000
    hidden = torch.ones(count, 1, dtype=torch.bfloat16)
    weight = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    vocabulary = Vocabulary(hidden, torch.nn.functional.linear, [weight], 1, 1)
    vocabulary.map(lambda logits, rows: [logits[:, 0]])[0].sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.bfloat16
    assert float(weight.grad) == pytest.approx(count, rel=2**-8)


def test_autocast_is_the_same_in_the_second_pass() -> None:
    problem = Problem(torch.float32)
    kinds = []

    def figures(logits: Tensor, rows: slice) -> Iterator[Tensor]:
        kinds.append(logits.dtype)
        return problem.figures(logits.float(), rows)

    with torch.autocast("cpu", torch.bfloat16):
        found = Vocabulary(problem.hidden, problem.head, [problem.weight, problem.bias], V, 1).map(figures)
    torch.stack(found).sum().backward()
    assert set(kinds) == {torch.bfloat16}
    assert len(kinds) == 2 * N
    assert problem.weight.grad is not None
    assert problem.weight.grad.dtype == torch.float32


def test_chunks_within_a_checkpointed_block() -> None:
    problem = Problem()
    found = checkpoint(lambda hidden: problem.mapped(2 * V), problem.hidden, use_reentrant=False)
    assert isinstance(found, Tensor)
    same(problem.gradients(found), problem.gradients(problem.plain()))


def test_a_large_vocabulary_has_more_logits_at_a_time_and_never_many_more() -> None:
    """Else a matrix product would have the rows of a few positions; a small one is as it was."""
    for device, most in (("cpu", 2**20), ("cuda", 2**27), ("xpu", 2**27)):
        for size in (100, 8192, 8193, 49152, 151_936, 10**6):
            positions = positions_at_once(size, device)
            assert positions >= min(128, most // size)
            assert positions * size <= 4 * most
            if most // size >= 128:
                assert positions == most // size
    assert positions_at_once(10**9, "cpu") == 1
    hidden = torch.zeros(200, 2)
    assert Vocabulary(hidden, torch.nn.functional.linear, [torch.zeros(16384, 2)], 16384).chunk == 128
