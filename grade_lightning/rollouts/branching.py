"""Branching: conversations that part where the policy has become uncertain."""

from collections.abc import Callable
from copy import deepcopy
from itertools import groupby
from typing import Any

import torch

from grade_lightning.errors import InputError, check_range
from grade_lightning.functional.branching import branches, first_surprise
from grade_lightning.policies import Policy
from grade_lightning.records import Prompts, Rollout

from .distribution import Distribution
from .engine import Engine
from .environment import Environment
from .episode import Episode, joined
from .turns import Turns


class Branching(Turns):
    """As many completions of each prompt, of which some begin in the middle of others.

    A share of a prompt's completions is begun. Whenever a turn after the first is drawn, another completion may begin
    from just before it: the likelier, the less probable the first tokens of the turn are, compared with those of the
    first turn. When all are over, what is left of the prompt's completions is drawn whole. A branch has the tokens of
    its trunk, and a deep copy of its environment.

    Args:
        environment: makes an environment for each completion; it can be copied.
        share: of a prompt's completions that are begun at once, at least one.
        probability: of a branch where the policy is as certain as in its first turn.
        weight: of the difference, per nat.
        penalty: share of the probability that each branch in a row takes off.
        window: tokens of a turn that are looked at.
        max_turns: turns of the policy at most.
        turn_tokens: most tokens of a turn; None: all that are left.
        engine: draws the policy's turns; `generate` of transformers by default.
        workers: environments that begin or answer at the same time, in threads.

    References:
        | Agentic Entropy-Balanced Policy Optimization (Dong et al., 2025), https://arxiv.org/abs/2510.14545
        | the rule: Agentic Reinforced Policy Optimization (Dong et al., 2025), https://arxiv.org/abs/2507.19849
    """

    def __init__(
        self,
        environment: Callable[[], Environment],
        share: float = 0.5,
        probability: float = 0.5,
        weight: float = 0.2,
        penalty: float = 0.2,
        window: int = 10,
        max_turns: int = 4,
        turn_tokens: int | None = None,
        engine: Engine | None = None,
        workers: int = 1,
    ) -> None:
        super().__init__(environment, max_turns, turn_tokens, engine, workers)
        check_range("[0, 1]", "engine", share=share, probability=probability, penalty=penalty)
        check_range("[0, inf)", "engine", weight=weight)
        check_range("[1, inf)", "engine", window=window)
        self.share, self.probability, self.weight = share, probability, weight
        self.penalty, self.window = penalty, window
        self._waiting: dict[int, list[int]] = {}
        """Rows that have not begun, by each row of the same prompt: one list for all of these."""
        self._first: dict[int, float] = {}
        self._branched: dict[int, int] = {}

    def generate(self, policy: Policy, distribution: Distribution, prompts: Prompts) -> Rollout:
        """One conversation for each prompt, with the global random state.

        Raises:
            InputError: an environment raises an exception or cannot be copied, or its opening leaves the policy no
                room; or the engine does not say with which probabilities it draws.
        """
        self._waiting, self._first, self._branched = {}, {}, {}
        episodes: dict[int, Episode] = {}
        for rows in same_prompts(prompts):
            begun = max(1, round(self.share * len(rows)))
            episodes |= self.begin(policy, distribution, prompts, rows[:begun])
            waiting = rows[begun:]
            self._waiting |= dict.fromkeys(rows, waiting)
        while True:
            while not all(episode.done for episode in episodes.values()):
                self.speak(policy, distribution, prompts, episodes)
            left = [row for row in range(len(prompts)) if row not in episodes]
            if not left:
                return joined([episodes[row] for row in range(len(prompts))], prompts, policy, distribution)
            for waiting in self._waiting.values():
                waiting.clear()
            episodes |= self.begin(policy, distribution, prompts, left)

    def drawn(self, row: int, episodes: dict[int, Episode], logps: list[float] | None) -> None:
        """Let another completion of the prompt begin from before the turn, if it is to."""
        if logps is None:
            raise InputError(
                f"engine {type(self.engine).__name__}: it does not return the probabilities of its tokens, "
                "which Branching needs; give it engine_logps, or take Turns"
            )
        now, trunk = first_surprise(torch.tensor(logps), self.window), episodes[row]
        if trunk.turn == 0:
            self._first[row], self._branched[row] = now, 0
            return
        uniform, waiting, before = float(torch.rand(())), self._waiting[row], self._branched[row]
        branched = branches(uniform, now - self._first[row], self.probability, self.weight, self.penalty * before)
        self._branched[row] = before + 1 if branched else 0
        if branched and waiting:
            other = waiting.pop(0)
            episodes[other] = _copy(trunk)
            self._first[other], self._branched[other] = self._first[row], self._branched[row]


def same_prompts(prompts: Prompts) -> list[list[int]]:
    """Rows that stand beside each other and have the same prompt and the same columns."""

    def content(row: int) -> tuple[Any, ...]:
        return prompts.keys[row], [values[row] for values in prompts.columns.values()]

    return [list(rows) for _, rows in groupby(range(len(prompts)), content)]


def _copy(trunk: Episode) -> Episode:
    try:
        return deepcopy(trunk)
    except Exception as error:  # the user's environment, which may hold anything
        name, reason = type(trunk.environment).__name__, " ".join(str(error).split())
        raise InputError(
            f"environment {name}: it cannot be copied ({reason}), as Branching does; add __deepcopy__ or take Turns"
        ) from error
