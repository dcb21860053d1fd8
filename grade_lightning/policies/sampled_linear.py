"""Linear layers that keep some rows of their input for the backward pass."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grade_lightning.errors import InputError, check_range
from grade_lightning.functional.row_sampling import shares, winner_take_all
from grade_lightning.numerics import widened

FEWEST = 10
"""Rows that are kept in any case, as in the authors' code."""


@dataclass(frozen=True)
class RowSampling:
    """Weight gradients of some linear layers from a part of their rows, which is all of the input that they keep.

    Their output, and the gradients of input and bias, stay exact; the weight gradient is right on average.

    Args:
        ratio: of the rows that are kept, a row being a token of the batch.
        layers: ends of the names of the layers.

    References:
        | Winner-Take-All Column Row Sampling for Memory Efficient Adaptation of Language Model (Liu et al., 2023),
          https://arxiv.org/abs/2305.15265. Departure: rows are chosen by the size of the input alone, since fresh
          completions have no gradients of an epoch before.
    """

    ratio: float = 0.3
    layers: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_range("(0, 1]", "row_sampling", ratio=self.ratio)


class SampledLinear(nn.Linear):
    """A linear layer with the weights of another one.

    Args:
        layer: whose place it takes.
        ratio: of the rows that are kept.
    """

    def __init__(self, layer: nn.Linear, ratio: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.ratio = layer.in_features, layer.out_features, ratio
        self.weight, self.bias = layer.weight, layer.bias
        self.training = layer.training

    def forward(self, inputs: Tensor) -> Tensor:
        """As of any linear layer."""
        if not (torch.is_grad_enabled() and self.weight.requires_grad):
            return nn.functional.linear(inputs, self.weight, self.bias)
        dtype = torch.get_autocast_dtype(inputs.device.type)
        if torch.is_autocast_enabled(inputs.device.type):
            inputs = inputs.to(dtype)
            bias = None if self.bias is None else self.bias.to(dtype)
            found: Tensor = _Sampled.apply(inputs, self.weight.to(dtype), bias, self.ratio)  # type: ignore[no-untyped-call]
            return found
        found = _Sampled.apply(inputs, self.weight, self.bias, self.ratio)  # type: ignore[no-untyped-call]
        return found


class _Sampled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, ratio: float) -> Tensor:
        rows = inputs.flatten(0, -2)
        k = max(FEWEST, int(ratio * len(rows)))
        sizes = torch.linalg.vector_norm(widened(rows), dim=-1)
        chosen = winner_take_all(shares(sizes), min(k, len(rows)))
        kept = rows[chosen.places] * chosen.scales.unsqueeze(1).to(rows.dtype)
        ctx.save_for_backward(weight, kept, chosen.places)
        ctx.has_bias = bias is not None
        return nn.functional.linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, arrived: Tensor) -> Any:
        weight, kept, places = ctx.saved_tensors
        rows = arrived.flatten(0, -2)
        bias = rows.sum(0) if ctx.has_bias else None
        return arrived @ weight, rows[places].T @ kept, bias, None


def sample_rows(model: nn.Module, settings: RowSampling) -> list[str]:
    """Put sampled layers in the place of those that are named and trained; their weights and names stay.

    Raises:
        InputError: there are none.
    """
    found = [
        name
        for name, layer in model.named_modules()
        if type(layer) is nn.Linear and layer.weight.requires_grad and _named(name, settings.layers)
    ]
    if not found:
        trained = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if type(m) is nn.Linear})
        raise InputError(
            f"--model.policy.row_sampling.layers {list(settings.layers)}: no linear layer that is trained is called "
            f"so; there are {', '.join(trained) or 'none'}"
        )
    for name in found:
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, SampledLinear(model.get_submodule(name), settings.ratio))  # type: ignore[arg-type]
    return found


def _named(name: str, ends: tuple[str, ...]) -> bool:
    """Whether one of the ends is a part of the name: of an adapter in a layer, too."""
    return any(end in name.split(".") for end in ends)
