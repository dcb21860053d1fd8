"""Passes: how a rollout goes through a network when its tokens are measured."""

from abc import ABC, abstractmethod

from torch import Tensor

from grade_lightning.records import Rollout

from .network import Network


class Pass(ABC):
    """One teacher-forced pass over a rollout. All passes give the same; they differ in time and memory."""

    @abstractmethod
    def hidden(self, network: Network, rollout: Rollout) -> Tensor:
        """Final hidden states from which the completion's tokens are predicted, (B, T, width)."""


class WholePass(Pass):
    """Each sequence by itself, prompt and completion, all at once."""

    def hidden(self, network: Network, rollout: Rollout) -> Tensor:
        """The last T positions before the last token."""
        inputs, length = network.embed(rollout.ids[:, :-1]), rollout.completion_ids.shape[1]
        return network.hidden(inputs, rollout.mask[:, :-1], length)
