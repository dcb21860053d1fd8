"""Attention over a row of several sequences, each by itself."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .network import Network

NAME = "grade_by_sequence"
"""Of this attention in transformers."""
LONGEST = 2**14
"""Tokens of a row above which its mask would be too large: 256 MB."""


@contextmanager
def attending_by_sequence(network: Network) -> Iterator[None]:
    """Attention computes the pairs of each sequence alone, where `sdpa` computes those of the row under a mask."""
    config: Any = network.base.config.get_text_config()
    own = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = own


def can_attend_by_sequence(network: Network, inputs: Tensor, tokens: int) -> bool:
    """Whether it is possible here, and gains.

    Finding the sequences would have a GPU wait, a compiler would meet other shapes each time, and checkpointing would
    compute another attention in the backward pass.

    Args:
        network: the network.
        inputs: its input embeddings.
        tokens: of the row.
    """
    config: Any = network.base.config.get_text_config()
    recomputes = network.base.is_gradient_checkpointing and network.base.training
    plain = config._attn_implementation == "sdpa" and not getattr(network, "torch_compile", False)
    return plain and not recomputes and inputs.device.type == "cpu" and tokens <= LONGEST


def _attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """As transformers' `sdpa`, of which it takes the mask: a sequence begins where a token does not see the last."""
    if attention_mask is None or attention_mask.dtype != torch.bool or len(query) > 1:
        found: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return found
    starts = (~attention_mask[0, 0].diagonal(-1)).nonzero().squeeze(1) + 1
    ends = [*starts.tolist(), query.shape[2]]
    parts: list[Tensor] = []
    lengths = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    for end, q, k, v in zip(ends, *(x.split(lengths, dim=2) for x in (query, key, value)), strict=True):
        own = slice(end - q.shape[2], end)
        mask = attention_mask[:, :, own, own]
        whole = int(mask[0, 0].sum()) == q.shape[2] * (q.shape[2] + 1) // 2  # each sees all before it: no window
        arguments = kwargs | {"is_causal": True} if whole else kwargs
        parts.append(sdpa_attention_forward(module, q, k, v, None if whole else mask, **arguments)[0])
    return torch.cat(parts, dim=1), None


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
