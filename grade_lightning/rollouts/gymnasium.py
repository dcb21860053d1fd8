"""Environments of Gymnasium that speak in text."""

import re
from importlib import import_module
from typing import Any

from grade_lightning.errors import InputError

from .environment import Environment, Message


class GymnasiumEnvironment(Environment):
    """An environment of Gymnasium whose observations are texts, and whose actions are texts or have names.

    The first observation is the opening. Each step's reward is the turn's; a conversation is over where the environment
    terminates or truncates it, or where the policy names no action. Needs `gymnasium`.

    Args:
        id: which, as for `gymnasium.make`; a module may stand before it, as `my_module:Maze-v0`.
        actions: the names of a discrete space's actions, in their order: the one that is named last is taken; None: the
            action is the turn's text, without white space at its ends.
        observation: what is said of an observation, with `{text}`.
        seed: the column with the number from which the environment begins; without it each begins by chance.
        arguments: further ones of `gymnasium.make`.
    """

    def __init__(
        self,
        id: str,
        actions: list[str] | None = None,
        observation: str = "\n{text}\n",
        seed: str = "seed",
        arguments: dict[str, Any] | None = None,
    ) -> None:
        self.actions, self.observation, self.seed = actions, observation, seed
        try:
            library = import_module("gymnasium")
        except ImportError as error:
            raise InputError(
                "GymnasiumEnvironment needs gymnasium: pip install 'grade-lightning[gymnasium]'"
            ) from error
        try:
            self.inner = library.make(id, **arguments or {})
        except (library.error.Error, ImportError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"GymnasiumEnvironment.id: {id}: {reason}; name one that is registered") from error

    def reset(self, row: dict[str, Any]) -> list[Message]:
        """Begin, from the row's number."""
        text, _ = self.inner.reset(seed=row.get(self.seed))
        return self._said(text)

    def step(self, text: str) -> tuple[list[Message], float | None, bool]:
        """Take the action."""
        action: Any = text.strip()
        if self.actions is not None:
            named = re.findall("|".join(rf"\b{re.escape(name)}\b" for name in self.actions), text)
            if not named:
                return [], None, True
            action = self.actions.index(named[-1])
        seen, reward, terminated, truncated, _ = self.inner.step(action)
        return self._said(seen), float(reward), bool(terminated or truncated)

    def close(self) -> None:
        """Let go of what it holds."""
        self.inner.close()

    def _said(self, text: Any) -> list[Message]:
        if not isinstance(text, str):
            raise InputError(
                f"its observation is of {type(text).__name__}, and the policy reads text; wrap it in a "
                "gymnasium.ObservationWrapper that writes one"
            )
        return [{"role": "environment", "content": self.observation.format(text=text)}]
