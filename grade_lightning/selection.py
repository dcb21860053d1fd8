"""Selection: how many completions each prompt gets, and which of them, and of their tokens, are trained on."""

import torch
from torch import Tensor

from grade_lightning.errors import check_range
from grade_lightning.functional.advantages import has_spread
from grade_lightning.records import Experience, Prompts
from grade_lightning.stateful import Stateful


class Selection(Stateful):
    """Everything: as many completions of each prompt, and all of them are trained on.

    A subclass changes one of the four decisions. Each process decides for its own prompts, and must keep at least one
    completion.
    """

    spare: int = 0
    """Further prompts in a batch for each that is needed; completions may be drawn again as many times."""

    def allocate(self, prompts: Prompts, budget: int) -> Tensor:
        """Completions of each prompt, (P,).

        Args:
            prompts: P prompts.
            budget: completions in all.
        """
        return torch.full((len(prompts),), budget // len(prompts))

    def resample(self, seen: Experience, wanted: int) -> int:
        """How many further prompts to draw completions of; 0: enough. Never more are drawn than the batch still has.

        Args:
            seen: all completions so far, with their scores.
            wanted: how many prompts are to be trained on.
        """
        return 0

    def keep(self, seen: Experience, wanted: int) -> Tensor | None:
        """Which completions are trained on, as numbers in this order, (b,), or as a mask, (B,), bool; None: all.

        Arguments as in :meth:`resample`.
        """
        return None

    def tokens(self, seen: Experience) -> Tensor | None:
        """Which of their tokens are trained on, (B, T), bool; None: all that were sampled.

        Args:
            seen: the completions that are kept, with statistics and advantages.
        """
        return None


class DynamicSampling(Selection):
    """Prompts that teach something: a group whose rewards are all equal is replaced by that of another prompt.

    The data give out `1 + max_retries` times as many prompts as are needed. What is still uniform after that many
    rounds stays in.

    Args:
        max_retries: rounds of sampling for other groups; 0: none.

    References:
        | DAPO: An Open-Source LLM Reinforcement Learning System at Scale (Yu et al., 2025),
          https://arxiv.org/abs/2503.14476
    """

    def __init__(self, max_retries: int = 2) -> None:
        check_range("[0, inf)", max_retries=max_retries)
        self.spare = max_retries

    def resample(self, seen: Experience, wanted: int) -> int:
        """As many as have no spread in their rewards."""
        return max(0, wanted - int(self._informative(seen).sum()))

    def keep(self, seen: Experience, wanted: int) -> Tensor:
        """Groups with a spread first, then others, in the order of the prompts."""
        groups = (~self._informative(seen)).long().argsort(stable=True)[:wanted]
        row = seen.rollout.layout.row
        return torch.cat([(row == group).nonzero().squeeze(1) for group in groups.tolist()])

    def _informative(self, seen: Experience) -> Tensor:
        return has_spread(seen.rollout.layout.table(seen.scores.total)).cpu()


class DropSolved(Selection):
    """Leaves out groups whose rewards are all the best: their advantage is 0, and their tokens count in no mean.

    Args:
        best: the largest reward that there can be.

    References:
        | NGRPO: Negative-enhanced Group Relative Policy Optimization (Nan et al., 2025),
          https://arxiv.org/abs/2509.18851
    """

    def __init__(self, best: float = 1.0) -> None:
        check_range("(-inf, inf)", best=best)
        self.best = best

    def tokens(self, seen: Experience) -> Tensor:
        """All tokens of the other groups."""
        layout = seen.rollout.layout
        table = layout.table(seen.scores.total)
        told = (table < self.best) | table.isinf()  # an infinite reward is an error, and must be noticed as one
        below = told.any(-1) | table.isnan().all(-1)
        kept = layout.rows(below.float().unsqueeze(1).expand(layout.shape)) > 0
        return kept.unsqueeze(1).expand_as(seen.rollout.sampled)
