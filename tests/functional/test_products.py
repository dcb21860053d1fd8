"""Products that are kept for later passes: made once, within a bound, and the numbers are the same."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from grade_lightning.functional import products as module
from grade_lightning.functional.products import Products, linear
from grade_lightning.functional.vocabulary import KEPT, Vocabulary, nothing_kept

N, H, V, CHUNK = 10, 4, 7, 3


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each product that is really made has."""
    rows: list[int] = []
    plain = Products.__call__

    class Counted(Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if function is Tensor.__matmul__ or function is Tensor.matmul:
                rows.append(args[0].shape[0])
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **(kwargs or {}))

    def counting(self: Products, hidden: Tensor, weight: Tensor, place: int = 0) -> Tensor:
        return plain(self, hidden.as_subclass(Counted), weight, place).as_subclass(Tensor)

    monkeypatch.setattr(Products, "__call__", counting)
    return rows


def vocabulary(room: int, head: Callable[..., Tensor] = linear) -> Vocabulary:
    torch.manual_seed(0)
    hidden = torch.randn(N, H, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, H, dtype=torch.float64, requires_grad=True)
    found = Vocabulary(hidden, head, [weight], V, CHUNK * V)
    found.products = Products(room)
    return found


def passes(found: Vocabulary) -> list[Tensor]:
    """Two hops, a last cotangent with both gradients, and a map with its own."""
    pulled = [found.pull(lambda logits, rows: logits.softmax(-1)) for _ in range(2)]
    zero, columns = found.push(lambda logits, rows: (logits.sin(), [logits.logsumexp(-1)]))
    inputs = [found.hidden, *found.parameters]
    pushed = torch.autograd.grad(zero, inputs)
    (mapped,) = found.map(lambda logits, rows: [logits.log_softmax(-1)[:, 0]])
    return [*pulled, *columns, *pushed, mapped, *torch.autograd.grad(mapped.square().sum(), inputs)]


@pytest.mark.parametrize("room", [0, CHUNK * V, 2 * CHUNK * V + 1, N * V])
@pytest.mark.parametrize("cap", [False, True])
def test_kept_or_not_the_numbers_are_the_same(room: int, cap: bool) -> None:
    def head(hidden: Tensor, weight: Tensor) -> Tensor:
        return 3 * (linear(hidden, weight) / 3).tanh() if cap else linear(hidden, weight)

    def plain(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = torch.nn.functional.linear(hidden, weight)
        return 3 * (logits / 3).tanh() if cap else logits

    found = vocabulary(room, head)
    for one, two in zip(passes(found), passes(vocabulary(0, plain)), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-13, atol=1e-13)
    assert found.products.room == room  # all of it is free again


@pytest.mark.parametrize(("room", "chunks"), [(0, 0), (CHUNK * V, 1), (2 * CHUNK * V + V, 3), (N * V, 4)])
def test_each_is_made_once_where_there_is_room(room: int, chunks: int, made: list[int]) -> None:
    """Chunks of 3, 3, 3 and 1 rows in two hops and a push; the last, small one may fit where others did not."""
    found = vocabulary(room)
    for _ in range(2):
        found.pull(lambda logits, rows: logits)
    found.push(lambda logits, rows: (logits, []))
    assert len(made) == 12 - 2 * chunks


def test_a_map_keeps_for_its_own_backward_pass_alone(made: list[int]) -> None:
    found = vocabulary(N * V)
    (column,) = found.map(lambda logits, rows: [logits[:, 0]])
    assert found.products.room == 0
    column.sum().backward()
    assert len(made) == 4
    with torch.no_grad():
        found.map(lambda logits, rows: [logits[:, 0]])
    assert found.products.room == N * V


def test_a_head_that_works_in_place_is_not_given_its_own_work() -> None:
    """Its product is made again."""

    def head(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = linear(hidden, weight)
        logits *= 0.5
        return logits

    found, truth = (passes(vocabulary(room, head)) for room in (N * V, 0))
    for one, two in zip(found, truth, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-13, atol=1e-13)


def test_each_layer_of_a_head_has_its_own_product() -> None:
    """Of the same shape, so that nothing but the weight tells them apart."""

    def head(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda hidden, first, last: function(function(hidden, first).tanh(), last)

    results = []
    for room, function in ((2 * N * H, linear), (0, torch.nn.functional.linear)):
        torch.manual_seed(0)
        hidden, *weights = (torch.randn(n, H, dtype=torch.float64, requires_grad=True) for n in (N, H, H))
        found = Vocabulary(hidden, head(function), weights, H, CHUNK * H)
        found.products = Products(room)
        results.append(passes(found))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-13, atol=1e-13)


def test_a_weight_over_frozen_states_gets_its_gradient() -> None:
    found = vocabulary(N * V)
    found.hidden.requires_grad_(False)
    weight = found.parameters[0]
    (column,) = found.map(lambda logits, rows: [logits[:, 0]])
    (gradient,) = torch.autograd.grad(column.sum(), weight)
    torch.testing.assert_close(gradient[0], found.hidden.sum(0))


def test_outside_of_a_head_it_is_torchs_own() -> None:
    hidden, weight, bias = torch.randn(2, H), torch.randn(V, H, requires_grad=True), torch.randn(V)
    found = module.linear(hidden, weight, bias)
    torch.testing.assert_close(found, torch.nn.functional.linear(hidden, weight, bias))
    assert found.requires_grad


def test_nothing_is_kept_while_memory_is_measured() -> None:
    with nothing_kept():
        assert Vocabulary(torch.ones(1, H), linear, [torch.ones(V, H)], V).products.room == 0
    assert KEPT == {"cpu": 2**25}


def test_processors_keep_a_bounded_number_and_gpus_none() -> None:
    assert vocabulary(0).products.room == 0
    assert Vocabulary(torch.ones(1, H), linear, [torch.ones(V, H)], V).products.room == KEPT["cpu"] == 2**25
    assert Vocabulary(torch.ones(1, H, device="meta"), linear, [torch.ones(V, H)], V).products.room == 0
