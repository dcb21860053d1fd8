"""A pass over long sequences chunk by chunk: the activations of one chunk are in memory at a time."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import DynamicCache

from grade_lightning.errors import InputError, check_range

from .anatomy import distance, some_tokens, tolerance
from .continuing import Call, keeps_all
from .continuing import continuation as continuation
from .network import Network
from .passes import WholePass
from .sharing import drops


class ChunkedPass(WholePass):
    """Sequences go through the network in chunks of positions, forwards without a graph and backwards with one of each.

    The keys and values of all positions are kept, and their gradients in the backward pass; activations only of one
    chunk. The gradient is that of the whole pass; it costs one more forward pass. A chunk to which no gradient arrives
    is skipped.

    Args:
        chunk: positions that go through together.
        keep: the probability with which a chunk takes part in the backward pass; below 1 the gradient is cheaper, and
            right only in the mean.

    References:
        | Training Long-Context LLMs Efficiently via Chunk-wise Optimization (Li et al., 2025),
          https://arxiv.org/abs/2505.16710. Departure: chunks are kept independently of each other (Bernoulli), and
          what passes a kept one is divided by `keep`, which is unbiased; a fixed number of chunks is not.
    """

    prompt_first = False

    def __init__(self, chunk: int = 256, keep: float = 1.0) -> None:
        check_range("[1, inf)", "ChunkedPass", chunk=chunk)
        check_range("(0, 1]", "ChunkedPass", keep=keep)
        self.chunk, self.keep = chunk, keep

    def check(self, network: Network) -> None:
        """Refuse a model that cannot continue from keys and values.

        Raises:
            InputError: it has a recurrent state or a sliding window, recomputes activations by itself, or differs.
        """
        base = network.base
        if not keeps_all(network):
            raise InputError(
                f"ChunkedPass: {type(base).__name__} has layers with a sliding window or a state, of which later "
                "chunks do not see all; leave policy.training_pass out"
            )
        if getattr(network, "gradient_checkpointing", False):
            raise InputError(
                "ChunkedPass recomputes activations by itself; leave policy.gradient_checkpointing or "
                "policy.training_pass out"
            )
        ids = some_tokens(base, 2, 6)
        if ids.is_meta:  # shapes alone
            return
        mask = torch.ones_like(ids)
        mask[1, 0] = 0
        inputs, positions = network.embed(ids).detach(), (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            whole = super().states(network, inputs, mask, positions)[mask.bool()]
            found = _forward(continuation(network, mask, positions), inputs, 2)[0][mask.bool()]
        if (gap := distance(found, whole)) > tolerance(whole):
            raise InputError(
                f"ChunkedPass: hidden states of {type(base).__name__} differ by {gap:.2g} of their spread when they "
                "are made in chunks; leave policy.training_pass out"
            )

    def states(self, network: Network, inputs: Tensor, attention_mask: Tensor | None, positions: Tensor) -> Tensor:
        """Final hidden states, (b, l, width)."""
        parameters = [p for p in network.base.parameters() if p.requires_grad]
        graph = torch.is_grad_enabled() and (inputs.requires_grad or bool(parameters))
        if attention_mask is None or attention_mask.dim() > 2 or not graph or inputs.shape[1] <= self.chunk:
            return super().states(network, inputs, attention_mask, positions)
        if self._drops(network):
            return super().states(network, inputs, attention_mask, positions)
        call = continuation(network, attention_mask, positions)
        found: Tensor = _Chunked.apply(call, self.chunk, self.keep, inputs, *parameters)  # type: ignore[no-untyped-call]
        return found

    def _drops(self, network: Network) -> bool:
        if found := drops(network.base):
            rank_zero_warn("sequences go through the network whole while dropout is on; set it to 0")
        return found


@torch.no_grad()
def _forward(call: Call, inputs: Tensor, chunk: int) -> tuple[Tensor, list[Tensor]]:
    """Hidden states, and keys and values of all layers, one chunk after another."""
    cache = DynamicCache()
    states = [call(inputs[:, first : first + chunk], cache, first) for first in range(0, inputs.shape[1], chunk)]
    return torch.cat(states, dim=1), _layers(cache)


def _layers(cache: Any) -> list[Tensor]:
    """Keys and values of all layers, each (b, heads, positions, width)."""
    return [part for layer in cache.layers for part in (layer.keys, layer.values)]


class _Chunked(torch.autograd.Function):
    """Hidden states of which the graph is made chunk by chunk in the backward pass, from the last to the first."""

    @staticmethod
    def forward(ctx: Any, call: Call, chunk: int, keep: float, inputs: Tensor, *parameters: Tensor) -> Tensor:
        states, kept = _forward(call, inputs, chunk)
        ctx.call, ctx.chunk, ctx.keep = call, chunk, keep
        ctx.autocast = _autocast(inputs.device.type)
        ctx.count = len(parameters)
        ctx.save_for_backward(inputs, *parameters, *kept)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, *rest = ctx.saved_tensors
        parameters, kept = rest[: ctx.count], rest[ctx.count :]
        arrived = [torch.zeros_like(part) for part in kept]
        at_inputs, at_parameters = torch.zeros_like(inputs), [torch.zeros_like(p) for p in parameters]
        for first in reversed(range(0, inputs.shape[1], ctx.chunk)):
            rows = slice(first, first + ctx.chunk)
            own = [gradient[:, rows], *(part[:, :, rows] for part in arrived)]
            if not any(bool(part.any()) for part in own) or _chance() >= ctx.keep:
                continue
            with torch.enable_grad(), ctx.autocast():
                x = inputs[:, rows].detach().requires_grad_()
                past = [part[:, :, :first].detach().requires_grad_() for part in kept] if first else []
                cache = DynamicCache()
                for layer, pair in enumerate(zip(past[::2], past[1::2], strict=True)):
                    cache.update(*pair, layer)
                states = ctx.call(x, cache, first)
                outputs = [states, *(part[:, :, rows] for part in _layers(cache))]
            found = torch.autograd.grad(
                outputs, [x, *past, *parameters], [part / ctx.keep for part in own], allow_unused=True
            )
            at_inputs[:, rows] = found[0]
            for total, part in zip([a[:, :, :first] for a in arrived] if first else [], found[1:], strict=False):
                total += part
            for total, part in zip(at_parameters, found[1 + len(past) :], strict=True):
                if part is not None:
                    total += part
        return None, None, None, at_inputs, *at_parameters


def _autocast(device: str) -> Callable[[], AbstractContextManager[Any]]:
    """The autocast that is in force now, to be entered again."""
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return lambda: torch.autocast(device, dtype=dtype, enabled=enabled)


def _chance() -> float:
    return float(torch.rand(()))
