"""The interface of an environment: whom the policy talks with."""

from abc import ABC, abstractmethod
from typing import Any

Message = dict[str, str]
"""What somebody says: `role` and `content`."""


class Environment(ABC):
    """One conversation partner of the policy, such as a tool, for one completion."""

    @abstractmethod
    def reset(self, row: dict[str, Any]) -> list[Message]:
        """Begin; what it returns stands between the prompt and the policy's first turn.

        Args:
            row: the columns of the prompt's row.
        """

    @abstractmethod
    def step(self, text: str) -> tuple[list[Message], float | None, bool]:
        """Answer the policy's turn.

        Args:
            text: what the policy wrote.

        Returns:
            The answer; a reward for the turn, or None; whether the conversation is over.
        """

    def close(self) -> float | None:
        """The conversation is over, by the environment's word or by a limit: let go of what is held.

        Called once for each conversation that has begun, also where a turn failed.

        Returns:
            What is added to the reward of the last turn, or None.
        """
        return None
