"""Consistency-aware policy optimisation."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from grade_lightning.advantages import group_standardised
from grade_lightning.answers import answer_numbers, last_line
from grade_lightning.errors import check_range
from grade_lightning.functional.aggregation import token_mean
from grade_lightning.functional.consistency import two_sources
from grade_lightning.functional.gates import clipped
from grade_lightning.gates import by_advantage
from grade_lightning.levels import token_level
from grade_lightning.modules import PolicyGradientModule
from grade_lightning.records import Experience, Prompts, TokenStats
from grade_lightning.terms import SecondLine


class COPO(PolicyGradientModule):
    """GRPO where the answers to a prompt differ; where they agree, prompts are compared with each other.

    Args:
        sharpness: k of the weight σ(k (E − b)) of the group's own advantages, E the entropy of its answers.
        threshold: b, in bits; −inf: the group's own advantages alone.
        forced: weight 0 where all rewards of a group are equal.
        answer: what of a completion is its answer, as text; an empty one does not count. The last line by default.
        epsilon: the ratio is clipped to 1 ± ε.
        dual: no gradient where A < 0 and the ratio exceeds this.
        num_generations: completions for each prompt, a group.
        **kwargs: those of :class:`~grade_lightning.modules.PolicyGradientModule`.

    References:
        | COPO: Consistency-Aware Policy Optimization (Han et al., 2025), https://arxiv.org/abs/2508.04138
    """

    min_generations = 2

    def __init__(
        self,
        sharpness: float = 5.0,
        threshold: float = 1.0,
        forced: bool = False,
        answer: Callable[[str], str] = last_line,
        epsilon: float = 0.2,
        dual: float = 3.0,
        num_generations: int = 8,
        **kwargs: Any,
    ) -> None:
        check_range("(0, inf)", sharpness=sharpness)
        check_range("[-inf, inf]", threshold=threshold)
        check_range("[0, inf]", epsilon=epsilon)
        check_range("[1, inf]", dual=dual)
        gate = by_advantage(clipped, low=1 - epsilon, high=1 + epsilon, dual=dual)
        super().__init__(
            advantage=group_standardised,
            level=token_level,
            gate=gate,
            aggregate=token_mean,
            clips=True,
            num_generations=num_generations,
            **kwargs,
        )
        self.terms.insert(1, SecondLine(gate, token_mean))
        self.sharpness, self.threshold, self.forced, self.answer = sharpness, threshold, forced, answer

    def sample(self, prompts: Prompts) -> Experience:
        """Completions with a number for each answer; −1: none."""
        seen = super().sample(prompts)
        answers = answer_numbers(seen.rollout.completions, self.answer)
        return replace(seen, extra={"answers": seen.scores.total.new_tensor(answers)})

    def appraise(self, seen: Experience, old: TokenStats) -> Experience:
        """Both advantages, each with its weight."""
        seen = super().appraise(seen, old)
        layout = seen.rollout.layout
        rewards, answers = layout.table(seen.rewards), layout.table(seen.extra["answers"]).nan_to_num(nan=-1.0).long()
        found = two_sources(rewards, answers, self.sharpness, self.threshold, self.forced, self.reduce.sum)
        own, others = (layout.spread(x).unsqueeze(1) for x in (found.share, found.others))
        weights = torch.ones_like(old.logps) if self.correction is None else self.correction(old.logps, seen.rollout)[0]
        extra = {"advantages": ((1 - own) * others * weights).masked_fill(~seen.mask, 0)}
        metrics = seen.metrics | {"answer_entropy": found.entropies.mean()}
        return replace(seen, advantages=own * seen.advantages, extra=extra, metrics=metrics)
