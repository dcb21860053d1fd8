"""Continuing: a sequence goes through a network in pieces, each behind the keys and values of those before it."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.profiler import record_function
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from grade_lightning.functional.sequences import position_ids

from .anatomy import difference, distance, some_tokens, tolerance
from .network import Network

Call = Callable[[Tensor, DynamicCache, int], Tensor]
"""Hidden states of a piece that begins at a position, with the keys and values of all before it."""


def continuation(network: Network, attention_mask: Tensor, positions: Tensor) -> Call:
    """What sends pieces of sequences through a network; a graph goes through keys and values, too.

    Args:
        network: the network.
        attention_mask: of the whole sequences, (b, l), 0 for padding.
        positions: of each input, (b, l).
    """

    def call(inputs: Tensor, cache: DynamicCache, first: int) -> Tensor:
        last = first + inputs.shape[1]
        with network.ready():
            output = network.body(
                inputs_embeds=inputs,
                attention_mask=attention_mask[:, :last],
                position_ids=positions[:, first:last],
                use_cache=True,
                **{network.cache_name: cache},
            )
        states: Tensor = output.logits if network.anatomy.body is None else output.last_hidden_state
        return states

    return call


def behind_prompt(network: Network, inputs: Tensor, attention_mask: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Final hidden states of the last `length` positions, and the inputs that are tokens of the completion.

    The prompt goes through the network first. No gradient at a token of the completion comes through its graph.

    Args:
        network: one that :func:`continues`.
        inputs: input embeddings, (b, p + length − 1, width): prompt, then completion without its last token.
        attention_mask: (b, p + length − 1), 0 for padding.
        length: tokens of the completion, 2 or more.

    Returns:
        Hidden states (b, length, width) and inputs (b, length − 1, width).
    """
    first = inputs.shape[1] - length + 1
    call, cache = continuation(network, attention_mask, position_ids(attention_mask)), DynamicCache()
    tokens = inputs[:, first:]
    tokens = tokens if tokens.requires_grad or not torch.is_grad_enabled() else tokens.requires_grad_()
    with record_function(network.phase):
        prompt = call(inputs[:, :first], cache, 0)
        return torch.cat([prompt[:, -1:], call(tokens, cache, first)], dim=1), tokens


def keeps_all(network: Network) -> bool:
    """Whether later pieces see all of the earlier ones: no layer has a sliding window or a state."""
    layers = DynamicCache(config=network.base.config.get_text_config()).layers
    return not network.base._is_stateful and all(type(layer) is DynamicLayer for layer in layers)


def continues(network: Network) -> bool:
    """Whether pieces give what the whole gives: what the model says of itself, and a few tokens.

    Args:
        network: in evaluation mode.
    """
    return keeps_all(network) and not difference(lambda: _trial(network))


def can_continue(network: Network) -> bool:
    """The same as it is now: recomputed activations have no keys and values, and a compiled body gets no cache."""
    recomputes = any(getattr(module, "gradient_checkpointing", False) for module in network.base.modules())
    return network.anatomy.continues and not recomputes and not getattr(network, "torch_compile", False)


@torch.enable_grad()
def _trial(network: Network) -> tuple[float, float]:
    """How far states of two pieces and gradients at the inputs are from those of the whole, and how far they may be."""
    ids = some_tokens(network.base, 2, 6)
    if ids.is_meta:  # shapes alone
        return 0.0, 0.0
    mask = torch.ones_like(ids)
    mask[1, 0] = 0
    inputs = network.embed(ids).detach().requires_grad_()
    whole = Network.states(network, inputs, mask, position_ids(mask))[:, -4:]
    found, _ = behind_prompt(network, inputs, mask, 4)
    cotangent = whole.detach().roll(1, -1)  # along themselves a norm lets nothing pass but rounding
    ours, theirs = (torch.autograd.grad(states, inputs, cotangent)[0] for states in (found, whole))
    return max(distance(found, whole), distance(ours, theirs)), tolerance(whole)
