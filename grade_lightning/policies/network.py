"""A causal network in two halves: from input embeddings to hidden states, and from these to logits."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function
from transformers import PreTrainedModel

from grade_lightning.functional.sequences import position_ids
from grade_lightning.functional.vocabulary import Head, Vocabulary

from .anatomy import Anatomy, run
from .head import head_of
from .loading import embedding_table


class Network(ABC):
    """What the methods need of a language model; the policy is one, and so is its reference."""

    phase = "network"
    """What a profiler calls a pass through it."""

    @property
    @abstractmethod
    def base(self) -> PreTrainedModel:
        """The transformers model itself, without the wrapper of its adapters."""

    @property
    @abstractmethod
    def anatomy(self) -> Anatomy:
        """Where it is cut into body and head."""

    @property
    def body(self) -> Callable[..., Any]:
        """The network below the head; all of it where it cannot be cut."""
        name = self.anatomy.body
        below: Callable[..., Any] = self.base if name is None else self.base.get_submodule(name)
        return below

    @property
    def cache_name(self) -> str:
        """What the model calls its key-value cache: `cache`, or `past_key_values` before transformers 5.24."""
        return "cache" if "cache" in inspect.signature(self.base.forward).parameters else "past_key_values"

    def ready(self) -> AbstractContextManager[Any]:
        """In which its parts are called."""
        return nullcontext()

    def embed(self, ids: Tensor) -> Tensor:
        """Input embeddings of `ids`, scaled as the model scales them; (…) → (…, width)."""
        with self.ready():
            embeddings: Tensor = self.base.get_input_embeddings()(ids)
        return embeddings

    def table(self) -> Tensor:
        """What :meth:`embed` returns for each token id, without a graph; (vocabulary, width)."""
        with self.ready():
            return embedding_table(self.base)

    def states(self, inputs: Tensor, attention_mask: Tensor | None, positions: Tensor) -> Tensor:
        """Final hidden states.

        Args:
            inputs: input embeddings, (b, l, width).
            attention_mask: (b, l), 0 for padding; or of which positions each one sees, as transformers takes it. None:
                a sequence begins wherever the positions start again.
            positions: position of each input, (b, l).

        Returns:
            (b, l, width).
        """
        with self.ready(), record_function(self.phase):
            output = run(self.body, inputs, attention_mask, positions)
        states: Tensor = output.logits if self.anatomy.body is None else output.last_hidden_state
        return states

    def hidden(self, inputs: Tensor, attention_mask: Tensor, length: int) -> Tensor:
        """Final hidden states of the last `length` positions, (b, length, width), each row by itself.

        Args:
            inputs: input embeddings, (b, l, width).
            attention_mask: (b, l), 0 for padding.
            length: number of positions wanted, counted from the end.
        """
        return self.states(inputs, attention_mask, position_ids(attention_mask))[:, -length:]

    def head(self) -> tuple[Head, list[Tensor]]:
        """What makes logits of hidden states, and its parameters."""
        return head_of(self.base, self.anatomy.body, self.anatomy.head)

    def vocabulary(self, hidden: Tensor, elements: int | None = None) -> Vocabulary:
        """The logits of hidden states (n, width), so many `elements` at a time."""
        head, parameters = self.head()
        return Vocabulary(hidden, head, parameters, self.anatomy.size, elements)

    def logits(self, inputs: Tensor, attention_mask: Tensor, length: int) -> Tensor:
        """Logits of the last `length` positions, all at once, (b, length, vocabulary); arguments as :meth:`hidden`."""
        hidden = self.hidden(inputs, attention_mask, length)
        whole = self.vocabulary(hidden.flatten(0, 1))
        return whole.head(whole.hidden, *whole.parameters).view(*hidden.shape[:2], -1)


class Frozen(Network):
    """A network that is not trained: its weights get no gradient, its inputs may.

    Args:
        base: the transformers model.
        anatomy: where it is cut.
        ready: in which it is called, such as without its adapters.
        way: how sequences go through it: the `states` of a training pass; each in its own row by default.
    """

    phase = "reference"

    def __init__(
        self,
        base: PreTrainedModel,
        anatomy: Anatomy,
        ready: Callable[[], AbstractContextManager[Any]],
        way: Callable[[Network, Tensor, Tensor | None, Tensor], Tensor] = Network.states,
    ) -> None:
        self._base, self._anatomy, self._ready, self._way = base, anatomy, ready, way

    @property
    def anatomy(self) -> Anatomy:
        """Where it is cut."""
        return self._anatomy

    @property
    def base(self) -> PreTrainedModel:
        """The transformers model."""
        return self._base

    def ready(self) -> AbstractContextManager[Any]:
        """In evaluation mode."""
        return self._ready()

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        """Input embeddings of `ids`, without a graph."""
        return super().embed(ids)

    def states(self, inputs: Tensor, attention_mask: Tensor | None, positions: Tensor) -> Tensor:
        """As of any network, in the way of the training pass."""
        return self._way(self, inputs, attention_mask, positions)

    def head(self) -> tuple[Head, list[Tensor]]:
        """As that of any network, and without gradients for its parameters."""
        head, parameters = super().head()

        def ready_head(*args: Tensor) -> Tensor:
            with self.ready():
                return head(*args)

        return ready_head, [p.detach() for p in parameters]
