"""A budget of completions that is shared out by how often each prompt has succeeded."""

from typing import Any

import torch
from torch import Tensor

from grade_lightning.distributed import Reduce
from grade_lightning.errors import check_range
from grade_lightning.functional.knapsack import allocate
from grade_lightning.memory import PromptMemory
from grade_lightning.records import Experience, Prompts
from grade_lightning.selection import Selection


class KnapsackBudget(Selection):
    """As many completions in all, more of them for prompts on which they are likely to differ.

    It remembers the success rate of each prompt. Each process shares out its own budget over its own prompts.

    Args:
        threshold: a reward of this or more is a success.
        least: completions of a prompt whose rate is known.
        most: of one that succeeds sometimes.
        known_after: rewards of a prompt from which on its rate is known.
        newest: the rate is that of the latest visit or, where this had fewer rewards than so many, of so many newest.
        capacity: prompts that are remembered.

    References:
        | Knapsack RL: Unlocking Exploration of LLMs via Optimizing Budget Allocation (Li et al., 2025),
          https://arxiv.org/abs/2509.25849
    """

    def __init__(
        self,
        threshold: float = 0.5,
        least: int = 2,
        most: int = 128,
        known_after: int = 8,
        newest: int = 16,
        capacity: int = 1_000_000,
    ) -> None:
        check_range("(-inf, inf)", threshold=threshold)
        check_range("[1, inf)", least=least, known_after=known_after, newest=newest)
        check_range(f"[{least}, inf)", most=most)
        self.threshold = threshold
        self.least = least
        self.most = most
        self.known_after = known_after
        self.newest = newest
        self.memory = PromptMemory(capacity)
        """Of each prompt: rewards so far, success rate, how many newest outcomes follow, and these, the latest last."""

    def rate(self, key: int) -> float:
        """Success rate of a prompt; NaN: unknown."""
        known = self.memory.get(key)
        return torch.nan if known is None or known[0] < self.known_after else float(known[1])

    def allocate(self, prompts: Prompts, budget: int) -> Tensor:
        """By success rate."""
        rates = torch.tensor([self.rate(key) for key in prompts.keys], dtype=torch.float64)
        return allocate(rates, budget, self.least, self.most)

    def observe(self, seen: Experience, reduce: Reduce) -> None:
        """Remember which completions of each prompt succeeded; those without a reward are none."""
        keys, rows = [], []
        table = seen.rollout.layout.table(seen.scores.total).cpu()
        for key, rewards in zip(seen.rollout.group_keys, table, strict=True):
            outcomes = (rewards[~rewards.isnan()] >= self.threshold).double()
            if len(outcomes):
                keys.append(key)
                rows.append(self._row(len(outcomes), float(outcomes.mean()), outcomes))
        values = torch.stack(rows) if rows else torch.empty(0, 3 + self.newest)
        self.memory.update(keys, values, self._merged, reduce)

    def _row(self, count: int, rate: float, outcomes: Tensor) -> Tensor:
        stored = outcomes[-self.newest :]
        row = torch.zeros(3 + self.newest, dtype=torch.float64)
        row[:3] = torch.tensor([count, rate, len(stored)])
        row[3 : 3 + len(stored)] = stored
        return row

    def _merged(self, known: Tensor | None, new: Tensor) -> Tensor:
        if known is None:
            return new
        outcomes = torch.cat([row[3 : 3 + int(row[2])] for row in (known, new)])[-self.newest :]
        rate = new[1] if new[0] >= self.newest else outcomes.mean()
        return self._row(int(known[0] + new[0]), float(rate), outcomes)

    def state_dict(self) -> dict[str, Any]:
        """The memory."""
        return self.memory.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it."""
        self.memory.load_state_dict(state)
