"""Passes: how a rollout goes through a network when its tokens are measured."""

from abc import ABC, abstractmethod
from typing import ClassVar

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from grade_lightning.functional.packing import completions_per_row, pack
from grade_lightning.records import Rollout

from .continuing import behind_prompt, can_continue
from .network import Network
from .sharing import drops, packed_hidden


class Pass(ABC):
    """One teacher-forced pass over a rollout. All passes give the same; they differ in time and memory."""

    shares_prompts: ClassVar[bool] = False
    """Whether it gains by completions of a prompt that go through the network together."""
    prompt_first: ClassVar[bool] = False
    """Whether prompts may go through the network before the completions where that saves something."""

    @abstractmethod
    def hidden(self, network: Network, rollout: Rollout) -> Tensor:
        """Final hidden states from which the completion's tokens are predicted, (B, T, width)."""

    def check(self, network: Network) -> None:
        """Look at a network when it is loaded, in evaluation mode.

        Raises:
            InputError: the pass is not for this network.
        """
        return None

    def states(self, network: Network, inputs: Tensor, attention_mask: Tensor | None, positions: Tensor) -> Tensor:
        """Final hidden states of embeddings, with their graph; arguments as :meth:`.Network.states`."""
        return Network.states(network, inputs, attention_mask, positions)

    def hidden_for_hops(
        self, network: Network, inputs: Tensor, attention_mask: Tensor, length: int
    ) -> tuple[Tensor, Tensor]:
        """Hidden states as :meth:`.Network.hidden`, and the inputs at which hops of :func:`.replay` take gradients.

        Where the network allows it these are the completion's alone: its backward pass leaves out the prompt, to which
        no hop carries anything. Else they are all.
        """
        if self.prompt_first and length > 1 and can_continue(network):
            return behind_prompt(network, inputs, attention_mask, length)
        return network.hidden(inputs, attention_mask, length), inputs


class WholePass(Pass):
    """Each sequence by itself, prompt and completion, all at once."""

    prompt_first = True

    def hidden(self, network: Network, rollout: Rollout) -> Tensor:
        """The last T positions before the last token."""
        inputs, length = network.embed(rollout.ids[:, :-1]), rollout.completion_ids.shape[1]
        return network.hidden(inputs, rollout.mask[:, :-1], length)


class SharedPrefixPass(WholePass):
    """The prompt of a group goes through the network once, with all its completions behind it.

    Attention costs (P + G·T)² then instead of G·(P + T)², for prompts of P tokens with G completions of T; everything
    else P + G·T instead of G·(P + T). So a large group has several copies of its prompt, as many as cost least, and
    behind a short prompt each completion goes through by itself.

    Where the model's attention does not allow it (a line at loading says so), while dropout is on, and where each
    completion has a prompt of its own, sequences go through the network as in :class:`WholePass`.

    References:
        | Prefix Grouper: Efficient GRPO Training through Shared-Prefix Forward (Liu et al., 2025),
          https://arxiv.org/abs/2506.05433
    """

    shares_prompts = True

    def hidden(self, network: Network, rollout: Rollout) -> Tensor:
        """Those of packed rows, brought into the order of the rollout.

        Raises:
            RuntimeError: the network was loaded before it got this pass.
        """
        obstacle = network.anatomy.obstacle
        if obstacle is None:
            raise RuntimeError("SharedPrefixPass: give it to the policy before Policy.load()")
        p, t = rollout.prompt_ids.shape[1], rollout.completion_ids.shape[1]
        row, column, (_, largest) = rollout.layout
        together = completions_per_row(p, t, largest, network.anatomy.width)
        if obstacle or together < 2 or self._drops(network):
            return super().hidden(network, rollout)
        copies = row * largest + column // together
        return packed_hidden(network, rollout.ids, pack(*rollout.host_lengths, copies, p, t))

    def _drops(self, network: Network) -> bool:
        with network.ready():
            found = drops(network.base)
        if found:
            rank_zero_warn("prompts are not shared in the training pass while dropout is on; set it to 0")
        return found
