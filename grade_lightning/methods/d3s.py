"""Dynamic dual-level down-sampling."""

from typing import Any

from grade_lightning.advantages import group_standardised
from grade_lightning.errors import check_range
from grade_lightning.functional.aggregation import token_mean
from grade_lightning.functional.gates import clipped
from grade_lightning.gates import by_advantage
from grade_lightning.levels import token_level
from grade_lightning.modules import PolicyGradientModule
from grade_lightning.schedules import Schedule
from grade_lightning.selection import Downsampling


class D3S(PolicyGradientModule):
    """GRPO on the completions whose advantages differ most, and on their tokens with the largest |A| · entropy.

    Args:
        row_share: which share of the completions is trained on, a schedule over the run; 0.25 to 0.75 by default.
        token_share: which share of their tokens; 0.2 to 0.6 by default.
        epsilon: the ratio is clipped to 1 ± ε.
        num_generations: completions for each prompt, a group.
        minibatches: optimizer steps for each window.
        **kwargs: those of :class:`~grade_lightning.modules.PolicyGradientModule`.

    References:
        | D3S: Learning More with Less: A Dynamic Dual-Level Down-Sampling Framework for Efficient Policy Optimization
          (Wang et al., 2025), https://arxiv.org/abs/2509.22115
    """

    min_generations = 2

    def __init__(
        self,
        row_share: Schedule | None = None,
        token_share: Schedule | None = None,
        epsilon: float = 0.2,
        num_generations: int = 8,
        minibatches: int = 4,
        **kwargs: Any,
    ) -> None:
        check_range("[0, inf]", epsilon=epsilon)
        super().__init__(
            advantage=group_standardised,
            level=token_level,
            gate=by_advantage(clipped, low=1 - epsilon, high=1 + epsilon),
            aggregate=token_mean,
            clips=True,
            selection=Downsampling(row_share, token_share),
            num_generations=num_generations,
            minibatches=minibatches,
            **kwargs,
        )
