"""Arbitrary entropy policy optimisation."""

from dataclasses import replace
from typing import Any, Literal

import torch

from grade_lightning.advantages import group_standardised
from grade_lightning.entropy_control import EntropyControl
from grade_lightning.errors import check_range
from grade_lightning.functional.aggregation import token_mean
from grade_lightning.functional.gates import clipped
from grade_lightning.gates import by_advantage, reinforced
from grade_lightning.levels import token_level
from grade_lightning.modules import PolicyGradientModule
from grade_lightning.records import Experience, Prompts, TokenStats


class AEPO(PolicyGradientModule):
    """GRPO, with extra completions at a temperature that is high while the entropy is low, and low while it is high.

    Args:
        mode: `rollout`: more completions, of the first quarter of the prompts, are drawn at that temperature;
            `reweight`: none are, but tokens of correct completions weigh more, most if it makes them likelier.
        target_entropy: nats per token.
        temperature_high: times the sampler's, while the entropy is at most the target.
        temperature_low: times the sampler's, while it is above.
        weight: `rollout`: of a reward in these completions; 0: none are drawn.
        most: `reweight`: the largest |H_target − H| that counts.
        correct: `reweight`: a completion with this reward or more is correct.
        epsilon: the ratio is clipped to 1 ± ε.
        num_generations: completions for each prompt, a group.
        **kwargs: those of :class:`~grade_lightning.modules.PolicyGradientModule`.

    References:
        | Arbitrary Entropy Policy Optimization (Wang et al., 2025), https://arxiv.org/abs/2510.08141
    """

    min_generations = 2

    def __init__(
        self,
        mode: Literal["rollout", "reweight"] = "rollout",
        target_entropy: float = 0.5,
        temperature_high: float = 1.2,
        temperature_low: float = 0.8,
        weight: float = 1.0,
        most: float = 0.1,
        correct: float = 0.5,
        epsilon: float = 0.2,
        num_generations: int = 8,
        **kwargs: Any,
    ) -> None:
        check_range("[0, inf]", epsilon=epsilon)
        check_range("[0, inf)", weight=weight, most=most)
        check_range("[-inf, inf]", correct=correct)

        gate = by_advantage(clipped, low=1 - epsilon, high=1 + epsilon)
        super().__init__(
            advantage=group_standardised,
            level=token_level,
            gate=gate if mode == "reweight" else reinforced(gate, "tempered"),
            aggregate=token_mean,
            clips=True,
            num_generations=num_generations,
            **kwargs,
        )
        self.control = EntropyControl(target_entropy, temperature_high, temperature_low)
        self.mode, self.weight, self.most, self.correct = mode, weight, most, correct

    def parts(self) -> dict[str, Any]:
        """With the controller."""
        return super().parts() | {"control": self.control}

    takes_older = False

    def sample(self, prompts: Prompts) -> Experience:
        """Completions, and in mode `rollout` more of them at another temperature."""
        seen = super().sample(prompts)
        if self.mode == "reweight" or self.weight == 0:
            return replace(seen, extra={"tempered": torch.zeros_like(seen.scores.total)})
        return self.with_tempered(seen, prompts.slice(0, -(-len(prompts) // 4)), self.control.temperature)

    def appraise(self, seen: Experience, old: TokenStats) -> Experience:
        """With the advantages of the other temperature."""
        seen = super().appraise(seen, old)
        if self.mode == "reweight":
            return self.control.reweighted(seen, self.correct, self.most, self.reduce)
        other = (self.weight * seen.rewards.nan_to_num(nan=0.0)).unsqueeze(1) * seen.mask
        return replace(seen, advantages=seen.advantages.where(seen.extra["tempered"].unsqueeze(1) == 0, other))
