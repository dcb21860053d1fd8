"""Selection: how many completions each prompt gets, and which of them, and of their tokens, are trained on."""

import torch
from torch import Tensor

from grade_lightning.errors import check_range
from grade_lightning.functional.advantages import has_spread
from grade_lightning.functional.downsampling import kept_count, max_variance_subset, top_share
from grade_lightning.records import Experience, Prompts
from grade_lightning.schedules import Linear, Schedule
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
        return layout.spread(below).unsqueeze(1).expand_as(seen.rollout.sampled)


class Downsampling(Selection):
    """The completions whose advantages have the largest variance, and in them the tokens with the largest |A| · H.

    A completion's advantage is that of its first token. Advantages are not taken anew over what is kept, and means are
    over the kept tokens. Each process chooses among its own completions of a window.

    Args:
        rows: which share of the completions is trained on, a schedule over the run; 0.25 to 0.75 by default.
        tokens: which share of their tokens; 0.2 to 0.6 by default.

    References:
        | D3S: Learning More with Less: A Dynamic Dual-Level Down-Sampling Framework for Efficient Policy Optimization
          (Wang et al., 2025), https://arxiv.org/abs/2509.22115
    """

    def __init__(self, rows: Schedule | None = None, tokens: Schedule | None = None) -> None:
        self.row_share = rows or Linear(0.25, 0.75)
        self.token_share = tokens or Linear(0.2, 0.6)
        for name, share in (("row_share", self.row_share), ("token_share", self.token_share)):
            check_range("(0, 1]", name, start=share.start, end=share.end)

    def tokens(self, seen: Experience) -> Tensor | None:
        """Those tokens; without completions that have no reward."""
        rows, tokens = (share(seen.step, seen.run_steps) for share in (self.row_share, self.token_share))
        if rows == tokens == 1:
            return None
        mask, first = seen.mask, seen.rollout.sampled.int().argmax(-1, keepdim=True)
        advantages = seen.advantages.gather(1, first).squeeze(1)
        chosen = max_variance_subset(advantages, kept_count(len(mask), rows), mask.any(-1))
        return top_share(seen.advantages.abs() * seen.old.entropy, tokens, mask & chosen.unsqueeze(1))
