"""Sharing: a network over packed rows, in which a prompt stands once before its completions, and what forbids that."""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from grade_lightning.functional.packing import Packing, block_causal, pack

from .anatomy import difference, distance, some_tokens, tolerance
from .network import Network

MASKED = "eager", "sdpa"
"""Attention implementations that take a mask of which positions each one sees."""


def packed_hidden(network: Network, ids: Tensor, packing: Packing) -> Tensor:
    """Final hidden states from which the completions' tokens are predicted, (b, t, width).

    Args:
        network: the network.
        ids: the sequences, (b, p + t).
        packing: where their tokens stand.
    """
    source, positions, segments, read = (index.to(ids.device, non_blocking=True) for index in packing)
    inputs = network.embed(ids.flatten()[source])
    mask = block_causal(segments).unsqueeze(1)
    if network.base.config.get_text_config()._attn_implementation != "sdpa":  # the others add the mask to the scores
        mask = torch.zeros_like(mask, dtype=inputs.dtype).masked_fill(~mask, torch.finfo(inputs.dtype).min)
    hidden: Tensor = network.states(inputs, mask, positions).flatten(0, 1)[read]
    return hidden


def obstacle(network: Network) -> str:
    """Why completions cannot share their prompt in this network; nothing if they can.

    A few tokens are tried in addition to what the model says of itself. Dropout is another matter: :func:`drops`.

    Args:
        network: in evaluation mode.
    """
    config = network.base.config.get_text_config()
    if config._attn_implementation not in MASKED:
        return f"{config._attn_implementation} attention takes no mask of its own"
    plain = all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)
    if not plain or network.base._is_stateful:
        return "it has layers with a sliding window or a state"
    if not network.base._supports_attention_backend:  # a mask may be only a part of what decides who sees whom
        return "its attention is not that of transformers' interface"
    return difference(lambda: _trial(network))


@torch.no_grad()
def _trial(network: Network) -> tuple[float, float]:
    """How far the hidden states of packed sequences are from those of each by itself, and how far they may be."""
    ids, p, t = some_tokens(network.base, 3, 8), 4, 4
    if ids.is_meta:  # shapes alone
        return 0.0, 0.0
    ids[1, :p], prompts, completions = ids[0, :p], torch.tensor([4, 4, 3]), torch.tensor([4, 3, 4])
    mask = torch.ones_like(ids)
    mask[2, 0] = 0
    packing = pack(prompts, completions, torch.tensor([0, 0, 1]), p, t)
    packed = packed_hidden(network, ids, packing)
    alone = network.hidden(network.embed(ids[:, :-1]), mask[:, :-1], t)
    there = (torch.arange(t) < completions.unsqueeze(1)).to(ids.device)
    return distance(packed[there], alone[there]), tolerance(alone)


def drops(model: Any) -> bool:
    """Whether a model has dropout that is on.

    Example:
        >>> drops(torch.nn.Dropout(0.1)), drops(torch.nn.Dropout(0.1).eval()), drops(torch.nn.Dropout(0.0))
        (True, False, False)
    """
    return any(_rate(module) > 0 for module in model.modules() if module.training)


def _rate(module: torch.nn.Module) -> float:
    """The largest dropout probability that a module keeps for itself; some call a function with it."""
    if isinstance(module, torch.nn.Dropout):
        return module.p
    own = vars(module).items()
    return max((value for name, value in own if "dropout" in name and isinstance(value, float)), default=0.0)
