"""A pass without padding: sequences of different length one after another in dense rows."""

from contextlib import nullcontext
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from grade_lightning.functional.dense_rows import DenseRows, cheapest_rows, dense_rows

from .anatomy import difference, distance, some_tokens, tolerance
from .by_sequence import attending_by_sequence, can_attend_by_sequence
from .network import Network
from .passes import WholePass
from .sharing import MASKED

LAYERS = {"full_attention", "sliding_attention"}
"""Kinds of layers for which transformers makes the mask of sequences that follow each other in a row."""


class PackedPass(WholePass):
    """Sequences go through the network one after another in a few rows, without the padding between them.

    Each token sees its own sequence alone and has the position that it has there, so hidden states and gradients are
    those of padded rows. On a processor all stand in one row, and attention computes the pairs of each sequence alone.
    Elsewhere, and where activations are computed again or the network is compiled, it computes the pairs of a row under
    a mask, and there are as many rows as cost least. Where nothing is padding, each sequence has its own row.
    Transformers finds the sequences of a row by positions that start again from 0.

    It is for all methods: policy gradients, the hops of GradeSTE, preferences, supervised learning. Where the model
    does not allow it (a line at loading says so), sequences go through the network as in :class:`WholePass`.
    """

    prompt_first = False

    def __init__(self) -> None:
        self.obstacle: str | None = None

    def check(self, network: Network) -> None:
        """Find out whether the model allows it, in addition to what it says by trying a few tokens."""
        self.obstacle = _obstacle(network)
        if self.obstacle:
            rank_zero_warn(
                f"{type(network.base).__name__} cannot take packed sequences in the training pass ({self.obstacle}); "
                "they go through it padded"
            )

    def states(self, network: Network, inputs: Tensor, attention_mask: Tensor | None, positions: Tensor) -> Tensor:
        """Final hidden states, (b, l, width); 0 in padding.

        Raises:
            RuntimeError: the network was loaded before it got this pass.
        """
        if self.obstacle is None:
            raise RuntimeError("PackedPass: give it to the policy before Policy.load()")
        if self.obstacle or attention_mask is None or attention_mask.dim() > 2:
            return super().states(network, inputs, attention_mask, positions)
        mask = attention_mask.bool().cpu()
        lengths = mask.sum(-1).tolist()
        alone = can_attend_by_sequence(network, inputs, sum(lengths))
        square = not alone and _attention(network) in MASKED
        rows = cheapest_rows(lengths, mask.shape[1], network.anatomy.width, square)
        if rows is None:
            return super().states(network, inputs, attention_mask, positions)
        with attending_by_sequence(network) if alone else nullcontext():
            return _packed(network, inputs, dense_rows(mask, torch.tensor(rows)))


def _packed(network: Network, inputs: Tensor, packing: DenseRows) -> Tensor:
    tokens, source, positions, read = (index.to(inputs.device, non_blocking=True) for index in packing)
    found = Network.states(network, inputs.flatten(0, 1)[source], None, positions).flatten(0, 1)
    places = found.new_zeros(inputs.shape[:2].numel(), found.shape[-1])
    states: Tensor = places.index_copy(0, tokens, found[read]).unflatten(0, inputs.shape[:2])
    return states


def _attention(network: Network) -> str:
    return str(network.base.config.get_text_config()._attn_implementation)


def _obstacle(network: Network) -> str:
    """Why sequences cannot follow each other in a row of this network; nothing if they can."""
    config: Any = network.base.config.get_text_config()
    if network.base._is_stateful or not set(getattr(config, "layer_types", None) or LAYERS) <= LAYERS:
        return "it has layers that carry a state from token to token, or attend to blocks"
    if not network.base._supports_attention_backend:  # its masks may not be those of transformers
        return "its attention is not that of transformers' interface"
    return difference(lambda: _trial(network))


@torch.no_grad()
def _trial(network: Network) -> tuple[float, float]:
    """How far the hidden states of packed sequences are from those of padded ones, and how far they may be."""
    ids = some_tokens(network.base, 3, 8)
    if ids.is_meta:  # shapes alone
        return 0.0, 0.0
    mask = torch.ones_like(ids)
    mask[0, :2], mask[1, 7:], mask[2, 2:] = 0, 0, 0
    inputs, positions = network.embed(ids), (mask.cumsum(-1) - 1).clamp(min=0)
    padded = Network.states(network, inputs, mask, positions)[mask.bool()]
    found = _packed(network, inputs, dense_rows(mask.bool().cpu(), torch.tensor([0, 0, 1])))[mask.bool()]
    gap = distance(found, padded)
    if can_attend_by_sequence(network, inputs, mask.numel()):
        with attending_by_sequence(network):
            found = _packed(network, inputs, dense_rows(mask.bool().cpu(), torch.tensor([0, 0, 0])))[mask.bool()]
        gap = max(gap, distance(found, padded))
    return gap, tolerance(padded)
