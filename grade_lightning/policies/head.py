"""The head: what stands between a network's final hidden states and its logits."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from grade_lightning.functional.vocabulary import Head, linear


def head_of(model: Any) -> tuple[Head, list[Tensor], int]:
    """What a transformers model makes of its final hidden states, by its own code: head, soft cap, scale.

    The network below the head is put aside, and the model's own `forward` is run over given hidden states.
    """
    output = model.get_output_embeddings()
    prefix = next(name for name, module in model.named_modules() if module is output)
    names = [f"{prefix}.{name}" for name, _ in output.named_parameters()]

    def head(hidden: Tensor, *parameters: Tensor) -> Tensor:
        below = model.base_model
        state = dict(zip(names, parameters, strict=True))
        with ExitStack() as stack:
            stack.enter_context(_forward(below, lambda *args, **kwargs: _Below(hidden.unsqueeze(0))))
            if type(output) is nn.Linear:
                stack.enter_context(_forward(output, lambda x: linear(x, output.weight, output.bias)))
            logits: Tensor = functional_call(model, state, kwargs={"inputs_embeds": hidden.unsqueeze(0)}).logits
        return logits.squeeze(0)

    return head, list(output.parameters()), output.weight.shape[0]


@contextmanager
def _forward(module: Any, function: Callable[..., Any]) -> Iterator[None]:
    """Another forward for a while; one that somebody has put there comes back."""
    own = vars(module).get("forward")
    module.forward = function
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


class _Below:
    """What the network below the head returns: hidden states, and None for whatever else a model asks of it."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None
