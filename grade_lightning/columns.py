"""Further statistics of each token, for parts that ask for them: measured with the others, in the same pass."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import ClassVar

from torch import Tensor


class Columns(ABC):
    """A part (advantage, selection, term) that wants more of each token than every method does.

    They are of the policy that sampled, have no graph, and are in `seen.old.columns` by their names.

    Example:
        >>> class Certainty(Columns):
        ...     names = ("certainty",)
        ...     def columns(self, logps, tokens, hidden):
        ...         yield logps.amax(-1).exp()
    """

    names: ClassVar[tuple[str, ...]]
    """Of the statistics; two parts that use the same name must mean the same."""

    @abstractmethod
    def columns(self, logps: Tensor, tokens: Tensor, hidden: Tensor) -> Iterable[Tensor]:
        """The statistics of some positions, in the order of :attr:`names`, each (n,).

        Args:
            logps: log-probabilities of the distribution that was sampled, (n, V); −inf outside of its support.
            tokens: the sampled tokens, (n,).
            hidden: final hidden states, (n, width).
        """
