"""The pass over the vocabulary, a chunk of positions at a time: nothing of size positions × vocabulary needs to live.

Hidden states h of n positions and an output head make logits; all that is wanted of them is a few numbers for each
position (log-probabilities, entropies, KL), or the way from a cotangent on the logits back to h. Both are computed
chunk by chunk, and the backward pass makes the logits of a chunk again. Gradients of the head add up in float32.

Letters in shapes: n positions, h width of the hidden states, k numbers for each position, v vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

Head = Callable[..., Tensor]
"""Maps hidden states (n, h) and the head's parameters to logits (n, v)."""
Function = Callable[[Tensor, slice], Tensor]
"""Maps the logits of some positions, and which of them they are, to what is wanted of them."""

Value = TypeVar("Value")

ELEMENTS = 2**23
"""Logits that are made at a time: 32 MB in float32."""


class Vocabulary:
    """Logits of n positions that are never all there, unless they are few.

    Args:
        hidden: (n, h), with or without a graph.
        head: makes logits of hidden states and `parameters`.
        parameters: of the head; those that require grad get one.
        size: number of logits of a position.
        elements: logits that are made at a time; `ELEMENTS` by default.

    Example:
        >>> hidden, weight = torch.eye(3), torch.eye(3)
        >>> vocabulary = Vocabulary(hidden, torch.nn.functional.linear, [weight], size=3, elements=3)
        >>> vocabulary.map(lambda logits, rows: logits.log_softmax(-1).amax(-1, keepdim=True))
        tensor([[-0.5514],
                [-0.5514],
                [-0.5514]])
    """

    def __init__(
        self,
        hidden: Float[Tensor, "n h"],
        head: Head,
        parameters: Sequence[Tensor],
        size: int,
        elements: int | None = None,
    ) -> None:
        self.hidden, self.head, self.parameters = hidden, head, tuple(parameters)
        self.chunk = max(1, (elements or ELEMENTS) // size)
        self._whole: Tensor | None = None

    @property
    def whole(self) -> bool:
        """Whether all logits fit into one chunk; they are then made once."""
        return len(self.hidden) <= self.chunk

    def map(self, function: Function) -> Float[Tensor, "n k"]:
        """What `function` makes of each position's logits, with the graph of hidden states and head.

        Args:
            function: maps logits (m, v) and the slice of positions that they belong to, to (m, k); differentiable,
                and the same each time it is called.
        """
        if self.whole:
            return function(self._logits(), slice(0, len(self.hidden)))
        mapped: Tensor = _Chunks.apply(function, self.head, self.chunk, self.hidden, *self.parameters)  # type: ignore[no-untyped-call]
        return mapped

    def pull(self, cotangent: Function) -> Float[Tensor, "n h"]:
        """The gradient at the hidden states of a cotangent on the logits, without a graph.

        Args:
            cotangent: maps logits (m, v), without a graph, and their positions to a cotangent (m, v).
        """
        if self.whole:
            logits = self._logits()
            weights = cotangent(logits.detach(), slice(0, len(self.hidden)))
            return torch.autograd.grad(logits, self.hidden, weights.to(logits.dtype), retain_graph=True)[0]
        pulled = torch.empty_like(self.hidden)
        frozen = [p.detach() for p in self.parameters]
        for rows in _slices(len(self.hidden), self.chunk):
            with torch.enable_grad():
                part = self.hidden[rows].detach().requires_grad_()
                logits = self.head(part, *frozen)
            weights = cotangent(logits.detach(), rows)
            (pulled[rows],) = torch.autograd.grad(logits, part, weights.to(logits.dtype))
        return pulled

    @torch.no_grad()
    def at(self, rows: slice) -> Float[Tensor, "m v"]:
        """The logits of some positions, without a graph."""
        return self._logits()[rows].detach() if self.whole else self.head(self.hidden[rows], *self.parameters)

    def once(self, function: Callable[[Tensor, slice], Value]) -> Callable[[Tensor, slice], Value]:
        """The same function, which is called but once where all logits fit into one chunk."""
        known: list[Value] = []

        def remembered(logits: Tensor, rows: slice) -> Value:
            if not self.whole:
                return function(logits, rows)
            if not known:
                known.append(function(logits, rows))
            return known[0]

        return remembered

    def _logits(self) -> Tensor:
        if self._whole is None:
            with torch.set_grad_enabled(torch.is_grad_enabled() or self.hidden.requires_grad):  # kept for later passes
                self._whole = self.head(self.hidden, *self.parameters)
        return self._whole


def surrogate(cotangent: Function) -> Function:
    """For :meth:`Vocabulary.map`: a number for each position whose gradient at the logits is the cotangent.

    Example:
        >>> logits = torch.zeros(1, 2, requires_grad=True)
        >>> surrogate(lambda logits, rows: torch.tensor([[1.0, -1.0]]))(logits, slice(0, 1)).sum().backward()
        >>> logits.grad
        tensor([[ 1., -1.]])
    """

    def contracted(logits: Tensor, rows: slice) -> Tensor:
        with torch.no_grad():
            weights = cotangent(logits.detach(), rows)
        return (weights * logits).sum(-1, keepdim=True)

    return contracted


def _slices(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


class _Chunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Function, head: Head, chunk: int, hidden: Tensor, *parameters: Tensor) -> Tensor:
        ctx.function, ctx.head, ctx.chunk = function, head, chunk
        ctx.save_for_backward(hidden, *parameters)
        device = hidden.device.type
        ctx.autocast = {
            "device_type": device,
            "enabled": torch.is_autocast_enabled(device),
            "dtype": torch.get_autocast_dtype(device),
        }
        return torch.cat([function(head(hidden[rows], *parameters), rows) for rows in _slices(len(hidden), chunk)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, *parameters = ctx.saved_tensors
        wanted = ctx.needs_input_grad[3:]
        # leaves of their own: hooks on the parameters must see the sum alone
        leaves = [p.detach().requires_grad_(need) for p, need in zip(parameters, wanted[1:], strict=True)]
        trained = [leaf for leaf in leaves if leaf.requires_grad]
        sums = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in trained]
        found = torch.empty_like(hidden) if wanted[0] else None
        with torch.enable_grad(), torch.autocast(**ctx.autocast):
            for rows in _slices(len(hidden), ctx.chunk):
                part = hidden[rows].detach().requires_grad_(wanted[0])
                inputs = [part, *trained] if wanted[0] else trained
                values = ctx.function(ctx.head(part, *leaves), rows)
                own = list(torch.autograd.grad(values, inputs, gradient[rows], allow_unused=True))
                if found is not None:
                    first = own.pop(0)
                    found[rows] = 0 if first is None else first
                for total, addend in zip(sums, own, strict=True):
                    if addend is not None:
                        total += addend
        totals = iter(sums)
        gradients = [
            next(totals).to(p.dtype) if leaf.requires_grad else None for p, leaf in zip(parameters, leaves, strict=True)
        ]
        return None, None, None, found, *gradients
