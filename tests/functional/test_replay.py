"""Replay on a hand-made causal map, against autograd through the sampler unrolled step by step."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from grade_lightning.functional.divergences import categorical_kl, kl_cotangent
from grade_lightning.functional.estimators import straight_through_gumbel
from grade_lightning.functional.replay import Adjoint, next_input_gradient, replay
from grade_lightning.functional.vocabulary import Vocabulary

B, P, T, W, V, R = 2, 3, 5, 4, 6, 3  # R: width of the reward's embeddings
TAU, BETA = 0.7, 0.4


class Found(NamedTuple):
    gradient: Tensor
    cotangent: Tensor
    """(B, T, V)"""
    residual: Tensor


class Toy:
    """logits = tanh(mix · x · inner) · head with a lower-triangular mix: causal, and nonlinear in every token."""

    def __init__(self, lengths: tuple[int, int] = (T, T)) -> None:
        torch.manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64)

        self.mix = normal(P + T - 1, P + T - 1).tril()
        self.inner, self.head = normal(W, W).requires_grad_(), (2 * normal(W, V)).requires_grad_()
        self.table, self.reward_table = normal(V, W), normal(V, R)
        self.prompt, self.direct = normal(B, P, W), normal(B, T, R)
        self.reference = normal(B, T, V).log_softmax(-1)
        self.tokens, self.noise = torch.randint(V, (B, T)), normal(B, T, V)
        self.mask = torch.arange(T) < torch.tensor(lengths).unsqueeze(1)

    def hidden(self, inputs: Tensor) -> Tensor:
        length = inputs.shape[1]
        return torch.tanh(self.mix[:length, :length] @ inputs @ self.inner)[:, P - 1 :]

    def logits(self, inputs: Tensor) -> Tensor:
        return self.hidden(inputs) @ self.head

    def gradient(self, objective: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(objective, [self.inner, self.head])])

    def unrolled(self, kl: bool) -> Tensor:
        """Each step's straight-through token becomes the next step's input, all in one graph."""
        inputs, objective = self.prompt, torch.zeros((), dtype=torch.float64)
        for t in range(T):
            logps = self.logits(inputs)[:, -1].log_softmax(-1)
            relaxed = torch.softmax((logps + self.noise[:, t]) / TAU, dim=-1)
            token = torch.nn.functional.one_hot(self.tokens[:, t], V) + relaxed - relaxed.detach()
            keep = self.mask[:, t].to(relaxed.dtype)
            objective = objective + keep @ (token @ self.reward_table * self.direct[:, t]).sum(-1)
            if kl:
                objective = objective - BETA * keep @ categorical_kl(logps, self.reference[:, t])
            inputs = torch.cat([inputs, (token @ self.table).unsqueeze(1)], dim=1)
        return self.gradient(objective)

    def replayed(
        self,
        hops: int,
        kl: bool = False,
        tolerance: float = 0.0,
        counter: list[int] | None = None,
        elements: int | None = None,
    ) -> Found:
        inputs = torch.cat([self.prompt, self.table[self.tokens[:, :-1]]], dim=1).requires_grad_()
        noise, reference = self.noise[self.mask], self.reference[self.mask]
        vocabulary = Vocabulary(self.hidden(inputs)[self.mask], torch.matmul, [self.head], V, elements)

        def cotangent(logits: Tensor, rows: slice, adjoint: Tensor) -> Tensor:
            if counter is not None:
                counter.append(1)
            relaxed = torch.softmax((logits.log_softmax(-1) + noise[rows]) / TAU, dim=-1).unsqueeze(0)
            return straight_through_gumbel(relaxed, adjoint, TAU)

        def source(logits: Tensor, rows: slice) -> Tensor:
            logps = logits.log_softmax(-1)
            return -BETA * kl_cotangent(logps, reference[rows], categorical_kl(logps, reference[rows]))

        direct, valid = [Adjoint(self.direct[self.mask], self.reward_table)], self.mask.flatten().nonzero().squeeze(1)
        result = replay(
            vocabulary, inputs, self.table, direct, cotangent, valid, T, hops, tolerance, source if kl else None
        )
        gradient = self.gradient(vocabulary.push(lambda logits, rows: (result.cotangent(logits, rows), []))[0])
        counter = None
        every = slice(0, int(self.mask.sum()))
        dense = torch.zeros(B, T, V, dtype=torch.float64)
        dense[self.mask] = result.cotangent(vocabulary.at(every), every).detach()
        return Found(gradient, dense, result.residual)


def close(found: Tensor, truth: Tensor) -> bool:
    return bool((found - truth).norm() < 1e-12 * truth.norm())


@pytest.mark.parametrize("kl", [False, True], ids=["reward", "reward and KL"])
@pytest.mark.parametrize("lengths", [(T, T), (2, 4), (1, T)], ids=str)
@pytest.mark.parametrize("elements", [None, 1, 2 * V, 5 * V], ids=["whole", "1", "2", "5"])
def test_all_hops_equal_the_unrolled_sampler(lengths: tuple[int, int], kl: bool, elements: int | None) -> None:
    """The surrogate Σ⟨cotangent, logits⟩ has the parameter gradient of the unrolled objective; fewer hops do not."""
    toy = Toy(lengths)
    truth = toy.unrolled(kl)
    assert close(toy.replayed(T - 1, kl, elements=elements).gradient, truth)
    assert not close(toy.replayed(0, kl, elements=elements).gradient, truth)


def test_more_hops_change_nothing() -> None:
    """The operator is nilpotent: hop T adds exactly nothing, and the residual says so."""
    toy = Toy()
    exact, beyond = toy.replayed(T - 1), toy.replayed(T + 3)
    assert torch.equal(exact.cotangent, beyond.cotangent)
    assert exact.residual > 0
    assert beyond.residual == 0


def test_each_hop_reaches_one_token_further_back() -> None:
    """Each token judged by the one before it alone, a reward at the last: k hops reach the last k + 1 positions."""
    toy = Toy()
    toy.mix = torch.eye(P + T - 1, dtype=torch.float64)
    toy.direct[:, :-1] = 0
    for hops in range(T):
        reached = toy.replayed(hops).cotangent.abs().sum((0, 2)) > 0
        assert reached.tolist() == [False] * (T - 1 - hops) + [True] * (hops + 1)


@pytest.mark.parametrize(("tolerance", "applications"), [(1e9, 2), (1e-300, T + 1), (0.0, T + 4)])
def test_tolerance_stops_early(tolerance: float, applications: int) -> None:
    """Applications of the map are hops made plus one: 1 hop, T hops (the one that adds nothing), or all T + 3."""
    toy, counter = Toy(), list[int]()
    found = toy.replayed(T + 3, tolerance=tolerance, counter=counter).gradient
    assert len(counter) == applications
    assert close(found, toy.replayed(applications - 1).gradient)


def test_residual_is_the_last_relative_change() -> None:
    """a⁰ = b and a¹ = b + shift(E · VJP(a⁰)), computed here by hand."""
    toy = Toy()
    result = toy.replayed(1)
    inputs = torch.cat([toy.prompt, toy.table[toy.tokens[:, :-1]]], dim=1).requires_grad_()
    logits = toy.logits(inputs)
    relaxed = torch.softmax((logits.detach().log_softmax(-1) + toy.noise) / TAU, dim=-1)
    b = toy.direct @ toy.reward_table.T
    hop = relaxed * (b - (relaxed * b).sum(-1, keepdim=True)) / TAU
    (gradient,) = torch.autograd.grad(logits, inputs, hop)
    change = gradient[:, P:] @ toy.table.T
    torch.testing.assert_close(result.residual, change.norm() / b.norm())
    assert toy.replayed(0).residual.isnan()


@pytest.mark.parametrize("hops", [0, 2, T - 1])
def test_nothing_flows_through_positions_after_the_end(hops: int) -> None:
    toy = Toy((2, 4))
    clean = toy.replayed(hops).cotangent
    assert (clean[~toy.mask] == 0).all()
    toy.direct[~toy.mask] = 1e6
    assert torch.equal(toy.replayed(hops).cotangent, clean)


def test_several_direct_parts_add() -> None:
    """Two adjoints, each with its own table and width, are one with the tables and gradients side by side."""
    torch.manual_seed(0)
    parts = [Adjoint(torch.randn(2, 3, w), torch.randn(5, w)) for w in (2, 4)]
    joint = Adjoint(torch.cat([p.gradient for p in parts], -1), torch.cat([p.table for p in parts], -1))
    torch.testing.assert_close(parts[0]() + parts[1](), joint())


@pytest.mark.parametrize(("prompt", "length"), [(1, 1), (3, 1), (1, 4), (3, 4)])
def test_next_input_gradient_against_a_loop(prompt: int, length: int) -> None:
    """Inputs are prompt tokens 0 … P−1, then completion tokens 0 … T−2; the last completion token is no input."""
    gradient = torch.randn(2, prompt + length - 1, 3)
    found = next_input_gradient(gradient, length)
    for t in range(length):
        expected = gradient[:, prompt + t] if t < length - 1 else torch.zeros(2, 3)
        assert torch.equal(found[:, t], expected)


def test_an_identity_map_gives_a_plain_sum() -> None:
    """One sequence, logits = inputs, table = identity, map = identity: a_t = Σ_{u ≥ t} b_u."""
    inputs = torch.zeros(1, 4, 2, requires_grad=True)
    b = torch.arange(8.0).view(4, 2)
    vocabulary = Vocabulary(inputs[0], torch.matmul, [torch.eye(2)], size=2)
    direct = [Adjoint(b, torch.eye(2))]
    result = replay(
        vocabulary, inputs, torch.eye(2), direct, lambda logits, rows, adjoint: adjoint, torch.arange(4), 4, hops=3
    )
    assert torch.equal(result.cotangent(torch.zeros(4, 2), slice(0, 4)), b.flip(0).cumsum(0).flip(0))
