"""Several rewards, added with weights."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from grade_lightning.errors import InputError, check_range
from grade_lightning.functional.replay import Adjoint
from grade_lightning.records import RelaxedRollout, Rollout, Scores, unique_name

from .base import Reward


class WeightedSum(Reward):
    """Several rewards, added with weights.

    Where one of them abstains the others count alone; one of weight 0 is only logged. Differentiable when all are.

    Args:
        rewards: the rewards.
        weights: one for each; 1 by default.
    """

    def __init__(self, rewards: list[Reward], weights: list[float] | None = None) -> None:
        super().__init__()
        weights = [1.0] * len(rewards) if weights is None else weights
        if not rewards or len(weights) != len(rewards):
            raise InputError(
                f"WeightedSum: {len(rewards)} rewards but {len(weights)} weights; give one weight for each"
            )
        for weight in weights:
            check_range("(-inf, inf)", "WeightedSum", weight=weight)
        self.rewards = nn.ModuleList(rewards)
        self.weights = weights
        self.differentiable = all(reward.differentiable for reward in rewards)

    def load(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
        """Load every part; what it reads may tell whether it is differentiable."""
        for reward in self.parts:
            reward.load(tokenizer, vocabulary)
        self.differentiable = all(reward.differentiable for reward in self.parts)

    @property
    def context_length(self) -> int | None:
        """The shortest of the parts'."""
        return min((n for reward in self.parts if (n := reward.context_length) is not None), default=None)

    @property
    def parts(self) -> list[Reward]:
        """The rewards that are added."""
        return [reward for reward in self.rewards if isinstance(reward, Reward)]

    def forward(self, rollout: Rollout) -> Tensor:
        """The weighted sum."""
        return self.score(rollout).total

    def score(self, rollout: Rollout) -> Scores:
        """The weighted sum and each part."""
        return self.begin(rollout)()

    def begin(self, rollout: Rollout) -> Callable[[], Scores]:
        """Begin with every part."""
        begun = [reward.begin(rollout) for reward in self.parts]
        return lambda: self._add(rollout, [finish() for finish in begun])

    def pathwise(self, rollout: Rollout) -> Scores:
        """The weighted sum, each part, and the gradients of all."""
        for reward in self.parts:
            if not reward.differentiable:
                reward.pathwise(rollout)  # says what to do instead
        return self._add(rollout, [reward.pathwise(rollout) for reward in self.parts])

    @property
    def reads_prefixes(self) -> bool:  # type: ignore[override]
        """Whether a part does."""
        return any(reward.reads_prefixes for reward in self.parts)

    def with_prefixes(self, rollout: Rollout) -> Scores:
        """The weighted sum, and that of what stands before each token, by the parts that score it."""
        if not self.reads_prefixes:
            return super().with_prefixes(rollout)
        found = [part.with_prefixes(rollout) if part.reads_prefixes else part.score(rollout) for part in self.parts]
        return self._add(rollout, found)

    def relaxed(self, rollout: RelaxedRollout) -> Scores:
        """The weighted sum and each part, with their graphs."""
        return self._add(rollout, [reward.relaxed(rollout) for reward in self.parts])

    def _add(self, rollout: Rollout, scores: list[Scores]) -> Scores:
        # 0 times an infinite reward is no number, and would pass for an abstention
        counted = [(w, s) for w, s in zip(self.weights, scores, strict=True) if w != 0]
        zeros = scores[0].total.new_zeros(1, len(scores[0].total))
        weighted = torch.stack([w * s.total for w, s in counted]) if counted else zeros
        total = weighted.nansum(0)
        total = total.where(~total.isnan(), torch.inf)  # of +∞ and −∞: a mistake, and no abstention
        total = total.masked_fill(weighted.isnan().all(0), torch.nan)
        parts: dict[str, Tensor] = {}
        for score in scores:
            for name, value in score.parts.items():
                parts[unique_name(name, parts)] = value
        adjoints = [Adjoint(w * part.gradient, part.table) for w, score in counted for part in score.adjoints]
        per_token, prefixes = None, [w * score.prefixes for w, score in counted if score.prefixes is not None]
        if any(score.per_token is not None for _, score in counted):
            spread = [w * score.at_tokens(rollout.sampled) for w, score in counted]
            per_token = torch.stack(spread).sum(0)
        return Scores(total, parts, adjoints, per_token, torch.stack(prefixes).sum(0) if prefixes else None)
