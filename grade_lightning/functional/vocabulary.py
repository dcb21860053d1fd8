"""The pass over the vocabulary, a chunk of positions at a time: nothing of size positions × vocabulary ever lives.

Hidden states h of n positions and an output head make logits; all that is wanted of them is a few numbers for each
position (log-probabilities, entropies, KL), or the way from a cotangent on the logits back to h and to the head. Logits
are made a chunk at a time, used, and forgotten; where they are needed again they are made again, but for the first
chunks, of which a processor keeps the head's product. Gradients of the head add up in float32.

Letters in shapes: n positions, h width of the hidden states, k numbers for each position, v vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.profiler import record_function

from .products import Products

Head = Callable[..., Tensor]
"""Maps hidden states (n, h) and the head's parameters to logits (n, v)."""
Cotangent = Callable[[Tensor, slice], Tensor]
"""Maps the logits of some positions (m, v), and which of them they are, to a cotangent on them, (m, v)."""
Columns = Callable[[Tensor, slice], Iterable[Tensor]]
"""Maps the same to numbers for each position, each (m,)."""

ELEMENTS = {"cpu": 2**20, "cuda": 2**27}
"""Logits that are made at a time: what a processor's cache holds, and what keeps a GPU busy."""
ROWS, TIMES = 128, 4
"""Under a large vocabulary those would be few positions, and a matrix product of few rows is slow: up to so many
positions are taken, for up to so many times as many logits."""
KEPT = {"cpu": 2**25}
"""Logits that are kept until they are needed again, 128 MB in float32; a GPU makes all of them again."""


class Vocabulary:
    """Logits of n positions that are never all there.

    Args:
        hidden: (n, h), with or without a graph.
        head: makes logits of hidden states and `parameters`.
        parameters: of the head; those that require grad get one.
        size: number of logits of a position.
        elements: logits that are made at a time; by default as :func:`positions_at_once` says.

    Example:
        >>> hidden, weight = torch.eye(3), torch.eye(3)
        >>> vocabulary = Vocabulary(hidden, torch.nn.functional.linear, [weight], size=3, elements=3)
        >>> vocabulary.map(lambda logits, rows: [logits.log_softmax(-1).amax(-1)])
        (tensor([-0.5514, -0.5514, -0.5514]),)
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
        self.chunk = positions_at_once(size, hidden.device.type) if elements is None else max(1, elements // size)
        self.products = Products(KEPT.get(hidden.device.type, 0))

    @record_function("vocabulary")
    def map(self, function: Columns, differentiable: int | None = None) -> tuple[Float[Tensor, " n"], ...]:
        """What `function` makes of each position's logits, with the graph of hidden states and head.

        Args:
            function: makes the same of the same logits each time. The backward pass takes from it no more than it
                needs: a generator need not compute the rest.
            differentiable: how many of its columns, the first ones, have a gradient; all by default.
        """
        products = self.products if torch.is_grad_enabled() else Products(0)  # without a graph there is no second pass
        columns: tuple[Tensor, ...] = _Map.apply(  # type: ignore[no-untyped-call]
            function, self.head, self.chunk, products, differentiable, self.hidden, *self.parameters
        )
        return columns

    def pull(self, cotangent: Cotangent) -> Float[Tensor, "n h"]:
        """The gradient at the hidden states of a cotangent on the logits, without a graph.

        Logits are kept for the next pass, as many as there is room for.
        """
        chunks = _Chunks(self.head, self.chunk, self.products, self.hidden.detach(), self.parameters, [True])
        for rows, logits in chunks:
            chunks.pull(logits, cotangent(logits.detach(), rows))
        assert chunks.found is not None
        return chunks.found

    @record_function("vocabulary")
    def push(
        self, function: Callable[[Tensor, slice], tuple[Tensor, Iterable[Tensor]]]
    ) -> tuple[Float[Tensor, ""], tuple[Float[Tensor, " n"], ...]]:
        """A scalar, 0, whose gradient at the logits is a cotangent; and numbers for each position, without a graph.

        The gradients at the hidden states and at the head are taken here, from the same logits as the numbers. The
        backward pass hands them on; it can be made once.

        Args:
            function: maps logits (m, v), without a graph, and their positions to a cotangent (m, v) and to columns,
                each (m,).
        """
        inputs = (self.hidden, *self.parameters)
        wanted = [torch.is_grad_enabled() and x.requires_grad for x in inputs]
        chunks = _Chunks(self.head, self.chunk, self.products, self.hidden.detach(), self.parameters, wanted, last=True)
        found: list[tuple[Tensor, ...]] = []
        for rows, logits in chunks:
            with torch.no_grad():
                cotangent, columns = function(logits.detach(), rows)
                found.append(tuple(columns))
            if any(wanted):
                chunks.pull(logits, cotangent)
        zero: Tensor = _Push.apply(chunks, *inputs)  # type: ignore[no-untyped-call]
        return zero, tuple(torch.cat(parts) for parts in zip(*found, strict=True))

    @torch.no_grad()
    def at(self, rows: slice) -> Float[Tensor, "m v"]:
        """The logits of some positions, without a graph."""
        return self.head(self.hidden[rows], *self.parameters)


@contextmanager
def nothing_kept() -> Iterator[None]:
    """Every pass makes its logits again, for a vocabulary that is made in it: its memory does not depend on `KEPT`."""
    before = dict(KEPT)
    KEPT.clear()
    try:
        yield
    finally:
        KEPT.update(before)


def positions_at_once(size: int, device: str) -> int:
    """How many positions have their logits made together.

    Args:
        size: logits of a position.
        device: its type.

    Example:
        >>> [positions_at_once(size, "cpu") for size in (1024, 8192, 32768, 131072)]
        [1024, 128, 128, 32]
    """
    elements = ELEMENTS.get(device, ELEMENTS["cuda"])
    return max(1, elements // size, min(ROWS, TIMES * elements // size))


def _leaves(parameters: Sequence[Tensor], products: Products) -> list[Tensor]:
    """The head's parameters, of which a weight says where its products are."""
    leaves = [parameter.detach() for parameter in parameters]
    for place, leaf in enumerate(leaves):
        leaf.products = products, place  # type: ignore[attr-defined]
    return leaves


def _slices(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, max(count, 1), size)]


class _Chunks:
    """Logits chunk by chunk with a graph of their own, and the sum of the gradients that are sent back through them.

    Args:
        head: makes logits.
        chunk: positions at a time.
        products: those of the head that are kept.
        hidden: (n, h), without a graph.
        parameters: of the head.
        wanted: which of hidden states and parameters have a gradient; none of those that are left out.
        last: whether no later pass needs what is kept.
    """

    def __init__(
        self,
        head: Head,
        chunk: int,
        products: Products,
        hidden: Tensor,
        parameters: Sequence[Tensor],
        wanted: Sequence[bool],
        last: bool = False,
    ) -> None:
        self.head, self.hidden, self.part = head, hidden, hidden
        self.products, self.last = products, last
        self.rows = _slices(len(hidden), chunk)
        self.found = torch.empty_like(hidden) if wanted[0] else None
        # leaves of their own: hooks on the parameters must see the sum alone
        needs = [*wanted[1:], *[False] * len(parameters)][: len(parameters)]
        self.leaves = [p.requires_grad_(need) for p, need in zip(_leaves(parameters, products), needs, strict=True)]
        self.trained = [leaf for leaf in self.leaves if leaf.requires_grad]
        self.totals = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in self.trained]
        for leaf, total in zip(self.trained, self.totals, strict=True):
            leaf.total = total  # type: ignore[attr-defined]  # `linear` adds to it by itself
        self._now = slice(0)

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        for rows in self.rows:
            with torch.enable_grad(), self.products.of(rows.start, self.last):
                self._now, self.part = rows, self.hidden[rows].detach().requires_grad_(self.found is not None)
                logits = self.head(self.part, *self.leaves)
            yield rows, logits

    def pull(self, outputs: Tensor | Sequence[Tensor], gradients: Tensor | Sequence[Tensor]) -> None:
        """Send gradients back from outputs that were made of the latest logits."""
        outputs, gradients = ([x] if isinstance(x, Tensor) else list(x) for x in (outputs, gradients))
        inputs = self.trained if self.found is None else [self.part, *self.trained]
        pairs = [(o, g.to(o.dtype)) for o, g in zip(outputs, gradients, strict=True) if o.requires_grad]
        own: list[Tensor | None] = [None] * len(inputs)
        if pairs:
            ends, cotangents = zip(*pairs, strict=True)
            own = list(torch.autograd.grad(ends, inputs, cotangents, allow_unused=True))
        if self.found is not None:
            first = own.pop(0)
            self.found[self._now] = 0 if first is None else first
        for total, addend in zip(self.totals, own, strict=True):
            if addend is not None:
                total += addend

    def gradients(self) -> list[Tensor | None]:
        """Of the parameters."""
        totals = iter(self.totals)
        return [next(totals).to(leaf.dtype) if leaf.requires_grad else None for leaf in self.leaves]


class _Map(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        function: Columns,
        head: Head,
        chunk: int,
        products: Products,
        differentiable: int | None,
        hidden: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.function, ctx.head, ctx.chunk, ctx.differentiable = function, head, chunk, differentiable
        ctx.products = products
        ctx.save_for_backward(hidden, *parameters)
        device = hidden.device.type
        ctx.autocast = {
            "device_type": device,
            "enabled": torch.is_autocast_enabled(device),
            "dtype": torch.get_autocast_dtype(device),
        }
        leaves, again = _leaves(parameters, products), any(ctx.needs_input_grad)
        parts: list[tuple[Tensor, ...]] = []
        for rows in _slices(len(hidden), chunk):
            with products.of(rows.start, last=not again):
                logits = head(hidden[rows], *leaves)
            parts.append(tuple(function(logits, rows)))
        columns = tuple(torch.cat(column) for column in zip(*parts, strict=True))
        ctx.mark_non_differentiable(*columns[len(columns) if differentiable is None else differentiable :])
        return columns

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, *parameters = ctx.saved_tensors
        with torch.enable_grad(), torch.autocast(**ctx.autocast):
            wanted = ctx.needs_input_grad[5:]
            chunks = _Chunks(ctx.head, ctx.chunk, ctx.products, hidden, parameters, wanted, last=True)
            for rows, logits in chunks:
                columns = list(islice(ctx.function(logits, rows), ctx.differentiable))
                chunks.pull(columns, [g[rows] for g in gradients[: len(columns)]])
        return None, None, None, None, None, chunks.found, *chunks.gradients()


class _Push(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chunks: _Chunks, hidden: Tensor, *parameters: Tensor) -> Tensor:
        ctx.chunks = chunks
        return hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        chunks, ctx.chunks = ctx.chunks, None
        if chunks is None:
            raise RuntimeError("the gradient of this loss has been taken before; make the loss again")
        if chunks.found is not None:
            chunks.found *= gradient
        for total in chunks.totals:  # in place: they are as large as the head
            total *= gradient
        return None, chunks.found, *chunks.gradients()
