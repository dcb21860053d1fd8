"""Group Relative Policy Optimization."""

from typing import Any, Literal

from grade_lightning.advantages import batch_standardised, group_centred, group_standardised
from grade_lightning.errors import check_range
from grade_lightning.functional.aggregation import sequence_mean
from grade_lightning.functional.gates import clipped
from grade_lightning.gates import by_advantage
from grade_lightning.kl import KL
from grade_lightning.levels import token_level
from grade_lightning.modules import PolicyGradientModule


class GRPO(PolicyGradientModule):
    """The advantage is the standardised reward within the completions of one prompt; a clipped ratio; k3 in the loss.

    Args:
        epsilon: the ratio is clipped to 1 ± ε.
        scale_rewards: whose standard deviation a reward is divided by: the `group`'s, the `batch`'s, or `none`.
        num_generations: completions for each prompt, a group.
        kl: the KL to the reference.
        **kwargs: those of :class:`~grade_lightning.modules.PolicyGradientModule`.

    References:
        | DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models (Shao et al., 2024),
          https://arxiv.org/abs/2402.03300
    """

    min_generations = 2

    def __init__(
        self,
        epsilon: float = 0.2,
        scale_rewards: Literal["group", "batch", "none"] = "group",
        num_generations: int = 8,
        kl: KL = KL(0.04, "k3", "loss"),
        **kwargs: Any,
    ) -> None:
        check_range("[0, inf]", epsilon=epsilon)
        scaled = {"group": group_standardised, "batch": batch_standardised, "none": group_centred}
        super().__init__(
            advantage=scaled[scale_rewards],
            level=token_level,
            gate=by_advantage(clipped, low=1 - epsilon, high=1 + epsilon),
            aggregate=sequence_mean,
            clips=True,
            num_generations=num_generations,
            kl=kl,
            **kwargs,
        )
