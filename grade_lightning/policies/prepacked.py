"""Linear layers whose weights lie, for a while, as a processor multiplies few rows with them fastest."""

import platform
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .modes import with_forward
from .sampled_linear import SampledLinear


def can_prepack() -> bool:
    """Whether this is an x86 processor, and torch was built with oneDNN."""
    return platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()


@contextmanager
def prepacked(model: nn.Module) -> Iterator[None]:
    """Linear layers compute with copies of their weights in the layout of oneDNN, without a graph.

    Products with few rows, such as those of sampling a token at a time, take a half to a quarter of their time then on
    an x86 processor. The copies take as much memory as the weights, until the end. Adapters in float32 are added to
    the copies; under other types, in which a small sum would be lost, and on other devices they stay beside them.
    Layers that are spread over processes, or of few bits, compute as ever; under autocast the copies have its type.

    Args:
        model: as it is; weights that change inside of this are not seen.

    Example:
        >>> layer, row = nn.Linear(3, 2), torch.ones(1, 3)
        >>> plain = layer(row).detach()
        >>> with torch.no_grad(), prepacked(layer):
        ...     torch.testing.assert_close(layer(row), plain)
    """
    with ExitStack() as stack, torch.no_grad():
        if can_prepack():
            merged: set[nn.Module] = set()
            for module in model.modules():
                if "forward" in vars(module) or module in merged:
                    continue  # somebody else computes, or an adapter's layer does it for this one
                found = _weight(module)
                if found is not None:
                    merged.update(module.modules())
                    stack.enter_context(with_forward(module, _product(*found)))
        yield


def _weight(module: Any) -> tuple[Tensor, Tensor | None, torch.dtype] | None:
    """A linear layer's weight (out, in), its bias, and the type that it computes in; None: it is to stay as it is."""
    if hasattr(module, "get_delta_weight"):
        found = _weight(module.base_layer) if _simple(module) else None
        if found is None or module.disable_adapters or found[2] != torch.float32:
            return None
        weight, bias, dtype = found
        for name in module.active_adapters:
            if name in module.lora_A:
                delta = module.get_delta_weight(name)
                weight = weight + (delta.mT if type(module.base_layer) is Conv1D else delta)
        return weight, bias, dtype
    if type(module) not in (nn.Linear, SampledLinear, Conv1D) or type(module.weight) is not nn.Parameter:
        return None
    weight = module.weight.detach()
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype
    fast = dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if weight.device.type != "cpu" or weight.dim() != 2 or not fast or weight.dtype == torch.float64:
        return None  # spread weights lie flat; autocast leaves float64 as it is
    return weight.mT if type(module) is Conv1D else weight, module.bias, dtype


def _simple(module: Any) -> bool:
    """Whether a layer with adapters is a product with one sum of matrices."""
    plain = not (module.merged or module.lora_variant or any(module.lora_bias.values()))
    return "lora_A" in dict(module.named_children()) and plain


def _product(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Callable[..., Tensor]:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype))
    bias = None if bias is None else bias.detach().to(dtype)

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        inputs = [*args, *kwargs.values()][0]  # each kind of layer has its own name for it
        product: Tensor = torch.ops.mkldnn._linear_pointwise(inputs.to(dtype), packed, bias, "none", [], "")
        return product

    return forward
