"""Several rewards, each normalised over its group before they are added."""

from transformers import PreTrainedTokenizerBase

from grade_lightning.errors import InputError
from grade_lightning.functional.advantages import group_standardised
from grade_lightning.records import RelaxedRollout, Rollout, Scores

from .base import Reward
from .weighted_sum import WeightedSum


class GroupNormalizedSum(WeightedSum):
    """Each reward less its mean over the completions of a prompt, over its standard deviation; then the weighted sum.

    Rewards of different scales so count by their weights alone, and combinations that have the same plain sum stay
    apart. Where the completions of a prompt all have the same reward, it adds nothing. Evaluation, which has one
    completion for each prompt, shows the plain weighted sum.

    Args:
        rewards: the rewards.
        weights: one for each; 1 by default.

    References:
        | GDPO: Group reward-Decoupled Normalization Policy Optimization for Multi-reward RL Optimization
          (Liu et al., 2026), https://arxiv.org/abs/2601.05242
    """

    def __init__(self, rewards: list[Reward], weights: list[float] | None = None) -> None:
        super().__init__(rewards, weights)
        self.differentiable = False

    @property
    def reads_prefixes(self) -> bool:  # type: ignore[override]
        """No: a mean over completions is of whole ones."""
        return False

    def load(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
        """Load every part."""
        super().load(tokenizer, vocabulary)
        self.differentiable = False

    def pathwise(self, rollout: Rollout) -> Scores:
        """Not to be had.

        Raises:
            InputError: always.
        """
        self._refuse()
        return super().pathwise(rollout)

    def relaxed(self, rollout: RelaxedRollout) -> Scores:
        """Not to be had.

        Raises:
            InputError: always.
        """
        self._refuse()
        return super().relaxed(rollout)

    def _add(self, rollout: Rollout, scores: list[Scores]) -> Scores:
        """The sum of the normalised parts, and each part as it is."""
        groups, plain = rollout.layout, super()._add(rollout, scores)
        if groups.shape[1] < 2:
            if self.training:
                self._refuse()
            return plain
        normalised = []
        for score in scores:
            values = groups.rows(group_standardised(groups.table(score.total)))
            values = values.where(score.total.isfinite(), score.total)  # abstentions, and mistakes that end the step
            normalised.append(Scores(values, {}))
        return Scores(super()._add(rollout, normalised).total, plain.parts)

    def _refuse(self) -> None:
        raise InputError(
            f"reward {self.name}: normalises over the completions of a prompt, of which this method draws one; use a "
            "method with num_generations above 1 (RLOO, GRPO …), or WeightedSum"
        )
