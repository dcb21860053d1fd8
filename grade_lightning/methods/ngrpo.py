"""Negative-enhanced group relative policy optimization."""

from typing import Any

from grade_lightning.advantages import VirtualBest
from grade_lightning.errors import check_range
from grade_lightning.functional.aggregation import token_mean
from grade_lightning.functional.gates import clipped
from grade_lightning.gates import by_advantage
from grade_lightning.levels import token_level
from grade_lightning.modules import PolicyGradientModule
from grade_lightning.selection import DropSolved, Selection


class NGRPO(PolicyGradientModule):
    """GRPO with a virtual completion of the best reward in each group, so that groups in which all fail count, too.

    Args:
        best: the largest reward that there can be.
        virtual: virtual completions of each group; 0: none.
        epsilon_low: the ratio is clipped below at 1 − this.
        epsilon_high: and above at 1 + this.
        num_generations: completions for each prompt, a group.
        minibatches: optimizer steps for each window.
        selection: by default groups whose rewards are all `best` are left out.
        **kwargs: those of :class:`~grade_lightning.modules.PolicyGradientModule`.

    References:
        | NGRPO: Negative-enhanced Group Relative Policy Optimization (Nan et al., 2025),
          https://arxiv.org/abs/2509.18851
    """

    min_generations = 2

    def __init__(
        self,
        best: float = 1.0,
        virtual: int = 1,
        epsilon_low: float = 0.16,
        epsilon_high: float = 0.24,
        num_generations: int = 8,
        minibatches: int = 4,
        selection: Selection | None = None,
        **kwargs: Any,
    ) -> None:
        check_range("[0, 1]", epsilon_low=epsilon_low)
        check_range("[0, inf]", epsilon_high=epsilon_high)
        check_range("[0, inf)", virtual=virtual)
        super().__init__(
            advantage=VirtualBest(best, virtual),
            level=token_level,
            gate=by_advantage(clipped, low=1 - epsilon_low, high=1 + epsilon_high),
            aggregate=token_mean,
            clips=True,
            selection=selection or DropSolved(best),
            num_generations=num_generations,
            minibatches=minibatches,
            **kwargs,
        )
