"""The head's matrix product, a chunk of positions at a time: its gradient adds up in place, its result may be kept.

Both are said by attributes of the weight that a head is called with, so that a head of any kind may stand around it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable


class Products:
    """Products of chunks that are made once for several passes, as many as there is room for.

    Args:
        room: numbers that may be kept.

    Example:
        >>> products, hidden, weight = Products(room=4), torch.eye(2), torch.ones(2, 2)
        >>> with products.of(0):
        ...     first = products(hidden, weight)
        >>> with products.of(0, last=True):
        ...     again = products(hidden, weight)
        >>> first.data_ptr() == again.data_ptr(), products.room
        (True, 4)
    """

    def __init__(self, room: int) -> None:
        self.room = room
        self._kept: dict[tuple[int, int], tuple[Tensor, int]] = {}
        self._start: int | None = None
        self._last = False

    @contextmanager
    def of(self, start: int, last: bool = False) -> Iterator[None]:
        """Inside it the products are those of the chunk that begins at `start`.

        Args:
            start: its first position.
            last: nobody will ask for them again.
        """
        self._start, self._last = start, last
        try:
            yield
        finally:
            self._start = None

    def __call__(
        self, hidden: Float[Tensor, "*n h"], weight: Float[Tensor, "v h"], place: int = 0
    ) -> Float[Tensor, "*n v"]:
        """The product, made or kept.

        Args:
            hidden: of the chunk.
            weight: of the head.
            place: of the weight among the head's parameters; a head may have several.
        """
        key = None if self._start is None else (self._start, place)
        found = None if key is None else self._kept.get(key)
        # a head may have worked on it in place
        fits = found is not None and (found[0].shape[:-1], found[0].dtype) == (hidden.shape[:-1], hidden.dtype)
        product = found[0] if found is not None and fits and found[0]._version == found[1] else hidden @ weight.mT
        if key is not None:
            self._remember(key, product)
        return product.detach()

    def _remember(self, key: tuple[int, int], product: Tensor) -> None:
        before = self._kept.pop(key, None)
        self.room += 0 if before is None else before[0].numel()
        if not self._last and product.numel() <= self.room:
            self._kept[key] = product, product._version
            self.room -= product.numel()


def linear(
    hidden: Float[Tensor, "*n h"], weight: Float[Tensor, "v h"], bias: Float[Tensor, " v"] | None = None
) -> Float[Tensor, "*n v"]:
    """As in torch; in a head, a chunk's gradient of the weight is added to the others without a tensor of its own.

    Example:
        >>> linear(torch.ones(1, 2), torch.eye(2))
        tensor([[1., 1.]])
    """
    total, products = getattr(weight, "total", None), getattr(weight, "products", None)
    if products is None or (torch.is_grad_enabled() and weight.requires_grad and not hidden.requires_grad):
        return torch.nn.functional.linear(hidden, weight, bias)
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    logits: Tensor = _Linear.apply(hidden, weight.detach().to(hidden.dtype), total, *products)  # type: ignore[no-untyped-call]
    return logits if bias is None else logits + bias.to(logits.dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, total: Tensor | None, products: Products, place: int
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.total = total
        return products(hidden, weight, place)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        hidden, weight = ctx.saved_tensors
        if ctx.total is not None:
            if gradient.dtype == ctx.total.dtype:
                ctx.total.addmm_(gradient.flatten(0, -2).mT, hidden.flatten(0, -2))
            else:
                ctx.total += gradient.flatten(0, -2).mT @ hidden.flatten(0, -2)
        return gradient @ weight if ctx.needs_input_grad[0] else None, None, None, None, None
