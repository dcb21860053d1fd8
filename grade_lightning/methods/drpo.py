"""Decoupled reward policy optimization."""

from typing import Any

from torch import Tensor

from grade_lightning.advantages import of_completions
from grade_lightning.distributed import Reduce
from grade_lightning.errors import check_range
from grade_lightning.functional.aggregation import Normalizers, group_sum
from grade_lightning.functional.decoupled import decoupled
from grade_lightning.gates import by_hardness
from grade_lightning.levels import token_level
from grade_lightning.modules import PolicyGradientModule
from grade_lightning.records import Experience
from grade_lightning.terms import DriftPenalty, Term


class DRPO(PolicyGradientModule):
    """Right completions are weighted against each other, short ones most; wrong ones by their likelihood.

    Args:
        threshold: a reward of this or more is right.
        length_temperature: of the weights of right completions; infinite: all the same, whatever their length.
        failure_temperature: of the weights of wrong completions; infinite: all the same.
        drift_penalty: of the squared excess of KL(π_old‖π), which is 0 in the first step of a window; 0: none.
        slack: how large that KL may be, in nats per token.
        terms: further terms of the loss.
        num_generations: completions for each prompt, a group.
        **kwargs: those of :class:`~grade_lightning.modules.PolicyGradientModule`.

    References:
        | DRPO: Efficient Reasoning via Decoupled Reward Policy Optimization (Li et al., 2025),
          https://arxiv.org/abs/2510.04474
    """

    min_generations = 2

    def __init__(
        self,
        threshold: float = 0.5,
        length_temperature: float = 0.1,
        failure_temperature: float = 10.0,
        drift_penalty: float = 1e3,
        slack: float = 1e-4,
        terms: list[Term] | None = None,
        num_generations: int = 8,
        **kwargs: Any,
    ) -> None:
        check_range("(-inf, inf)", threshold=threshold)
        check_range("(0, inf]", length_temperature=length_temperature, failure_temperature=failure_temperature)
        check_range("[0, inf)", drift_penalty=drift_penalty, slack=slack)

        def advantage(seen: Experience, reduce: Reduce) -> Tensor:
            layout, total = seen.rollout.layout, seen.scores.total
            lengths = layout.table(seen.rollout.sampled.sum(-1).to(total.dtype))
            longest = self.sampler.max_new_tokens
            table = decoupled(layout.table(total), lengths, longest, threshold, length_temperature)
            return of_completions(layout.rows(table), seen)

        def aggregate(mask: Tensor, normalizers: Normalizers) -> Tensor:
            return group_sum(mask, normalizers, num_generations)

        super().__init__(
            advantage=advantage,
            level=token_level,
            gate=by_hardness(threshold, failure_temperature),
            aggregate=aggregate,
            clips=False,
            terms=[*([DriftPenalty(drift_penalty, slack)] if drift_penalty else []), *(terms or [])],
            whole_groups=True,
            num_generations=num_generations,
            **kwargs,
        )
