"""The head: what stands between a network's final hidden states and its logits."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from grade_lightning.functional.products import linear
from grade_lightning.functional.vocabulary import Head

from .modes import with_forward


def head_of(model: Any, body: str | None, names: Sequence[str]) -> tuple[Head, list[Tensor]]:
    """What a transformers model makes of its final hidden states, by its own code: layers, soft cap, scale.

    The body is put aside, and the model's own `forward` is run over given hidden states.

    Args:
        model: the model.
        body: name of the module that makes the hidden states; None: these are the logits already.
        names: of the head's parameters.

    Returns:
        The head, and its parameters.
    """
    if body is None:
        return _nothing, []
    below, output = model.get_submodule(body), model.get_output_embeddings()

    def head(hidden: Tensor, *parameters: Tensor) -> Tensor:
        state = dict(zip(names, parameters, strict=True))
        with ExitStack() as stack:
            stack.enter_context(with_forward(below, lambda *args, **kwargs: _Below(hidden.unsqueeze(0))))
            if type(output) is nn.Linear:
                stack.enter_context(with_forward(output, lambda x: linear(x, output.weight, output.bias)))
            logits: Tensor = functional_call(model, state, kwargs={"inputs_embeds": hidden.unsqueeze(0)}).logits
        return logits.squeeze(0)

    return head, [model.get_parameter(name) for name in names]


def _nothing(hidden: Tensor) -> Tensor:
    return hidden


class _Below:
    """What the network below the head returns: hidden states, and None for whatever else a model asks of it."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None
