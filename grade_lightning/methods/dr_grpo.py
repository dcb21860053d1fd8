"""GRPO done right: no division by a length or by a standard deviation."""

from typing import Any

from torch import Tensor

from grade_lightning.advantages import group_centred
from grade_lightning.errors import check_range
from grade_lightning.functional.aggregation import Normalizers, constant
from grade_lightning.functional.gates import clipped
from grade_lightning.gates import by_advantage
from grade_lightning.levels import token_level
from grade_lightning.modules import PolicyGradientModule


class DrGRPO(PolicyGradientModule):
    """GRPO without its two biases: advantages are only centred, and tokens of all completions weigh the same.

    The token sum is divided by `sampler.max_new_tokens`, the longest possible completion.

    Args:
        epsilon: the ratio is clipped to 1 ± ε.
        num_generations: completions for each prompt, a group.
        **kwargs: those of :class:`~grade_lightning.modules.PolicyGradientModule`.

    References:
        | Understanding R1-Zero-Like Training: A Critical Perspective (Liu et al., 2025),
          https://arxiv.org/abs/2503.20783
    """

    min_generations = 2

    def __init__(self, epsilon: float = 0.2, num_generations: int = 8, **kwargs: Any) -> None:
        check_range("[0, inf]", epsilon=epsilon)

        def over_the_longest(mask: Tensor, normalizers: Normalizers) -> Tensor:
            return constant(mask, normalizers, self.sampler.max_new_tokens)

        super().__init__(
            advantage=group_centred,
            level=token_level,
            gate=by_advantage(clipped, low=1 - epsilon, high=1 + epsilon),
            aggregate=over_the_longest,
            clips=True,
            num_generations=num_generations,
            **kwargs,
        )
