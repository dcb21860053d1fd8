"""REINFORCE Leave-One-Out."""

from typing import Any, Literal

from grade_lightning.advantages import OptimalTokenBaseline, leave_one_out
from grade_lightning.functional.aggregation import sequence_sum
from grade_lightning.functional.gates import reinforce
from grade_lightning.gates import by_advantage
from grade_lightning.kl import KL
from grade_lightning.levels import token_level
from grade_lightning.modules import PolicyGradientModule


class RLOO(PolicyGradientModule):
    """The baseline of a completion is the mean reward of the others of its prompt; the KL is part of the reward.

    Args:
        baseline: what is taken off a reward: the mean of the `others`, or at each `token` a mean in which they count by
            their noise so far.
        num_generations: completions for each prompt.
        kl: the KL to the reference.
        **kwargs: those of :class:`~grade_lightning.modules.PolicyGradientModule`.

    References:
        | Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in LLMs
          (Ahmadian et al., 2024), https://arxiv.org/abs/2402.14740
        | the baseline of tokens: The Optimal Token Baseline (2026), https://arxiv.org/abs/2602.07078
    """

    min_generations = 2

    def __init__(
        self,
        baseline: Literal["others", "token"] = "others",
        num_generations: int = 4,
        kl: KL = KL(0.05, credit="sequence"),
        **kwargs: Any,
    ) -> None:
        super().__init__(
            advantage=leave_one_out if baseline == "others" else OptimalTokenBaseline(),
            level=token_level,
            gate=by_advantage(reinforce),
            aggregate=sequence_sum,
            clips=False,
            num_generations=num_generations,
            kl=kl,
            **kwargs,
        )
