"""What a reward is: a scalar of prompt and completion, differentiable in the completion's tokens or not."""

from abc import ABC, abstractmethod
from collections.abc import Container
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from grade_lightning.errors import InputError, check_range
from grade_lightning.functional.replay import Adjoint
from grade_lightning.rollouts import RelaxedRollout, Rollout


@dataclass
class Scores:
    """Rewards of a rollout, in float32 or better whatever computed them; NaN where a reward abstains."""

    total: Tensor
    """(B,)"""
    parts: dict[str, Tensor]
    """Each named reward's own value, (B,)."""
    adjoints: list[Adjoint] = field(default_factory=list)
    """Gradient of `total.nansum()` at the completion's tokens; only from :meth:`Reward.pathwise`."""

    def __post_init__(self) -> None:
        """Rewards of a group differ by less than half precision can tell."""
        self.total = _full(self.total)
        self.parts = {name: _full(value) for name, value in self.parts.items()}

    def select(self, rows: Tensor) -> "Scores":
        """Those of some of the sequences; without adjoints."""
        return Scores(self.total[rows], {name: value[rows] for name, value in self.parts.items()})

    @classmethod
    def join(cls, scores: "list[Scores]") -> "Scores":
        """Those of several rollouts; without adjoints."""
        parts = {name: torch.cat([score.parts[name] for score in scores]) for name in scores[0].parts}
        return cls(torch.cat([score.total for score in scores]), parts)


def _full(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def unique_name(name: str, taken: Container[str]) -> str:
    """`name`, or `name-2` and so on where it is taken.

    Example:
        >>> unique_name("classifier", {"classifier", "classifier-2"})
        'classifier-3'
    """
    unique, n = name, 1
    while unique in taken:
        n += 1
        unique = f"{name}-{n}"
    return unique


class Reward(nn.Module, ABC):
    """Scores prompt + completion: the same span of text in training, validation and testing.

    A scalar reward implements :meth:`forward`. A :class:`DifferentiableReward` can also be used by the methods that
    backpropagate through it. Subclass either in your own package and name it by its dotted path.
    """

    differentiable = False

    @property
    def name(self) -> str:
        """Under which it is logged, as `rewards/{name}`."""
        return type(self).__name__

    def load(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
        """Read weights, with the policy's tokenizer and number of logits; called before each stage."""

    @abstractmethod
    def forward(self, rollout: Rollout) -> Tensor:
        """Scores, (B,), without a graph; NaN to abstain."""

    def score(self, rollout: Rollout) -> Scores:
        """Scores with their parts."""
        with torch.no_grad():
            total = self(rollout)
        return Scores(total, {self.name: total})

    def relaxed(self, rollout: RelaxedRollout) -> Scores:
        """Scores of the soft tokens, with their graph.

        Raises:
            InputError: the reward is not differentiable.
        """
        return self.pathwise(rollout)  # says what to do instead

    def pathwise(self, rollout: Rollout) -> Scores:
        """Scores with the gradient at the tokens.

        Raises:
            InputError: the reward is not differentiable.
        """
        raise InputError(
            f"reward {self.name}: not differentiable, and GRADE sends the reward's gradient through the tokens; use a "
            "ClassifierReward of the policy's vocabulary (grade-fit --model RewardModel trains one)"
        )


class NoReward(Reward):
    """Abstains always: for learning from preferences alone."""

    def forward(self, rollout: Rollout) -> Tensor:
        """NaN."""
        return torch.full((len(rollout.ids),), torch.nan, device=rollout.ids.device)

    def score(self, rollout: Rollout) -> Scores:
        """NaN, of no parts."""
        return Scores(self(rollout), {})


class DifferentiableReward(Reward):
    """A reward that reads token embeddings, so that its gradient reaches the tokens."""

    differentiable = True

    @abstractmethod
    def table(self) -> Tensor:
        """Embedding table, (vocabulary of the policy, width)."""

    @abstractmethod
    def score_embeddings(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """Scores, (B,), of embeddings (B, L, width) with attention mask (B, L); differentiable."""

    def forward(self, rollout: Rollout) -> Tensor:
        """Scores of the sampled tokens."""
        return self.score_embeddings(self.table()[rollout.ids], rollout.mask)

    def pathwise(self, rollout: Rollout) -> Scores:
        """One forward pass and one backward pass with respect to the completion's embeddings."""
        table = self.table()
        with torch.enable_grad():
            prompt, completion = table[rollout.prompt_ids], table[rollout.completion_ids].requires_grad_()
            total = self.score_embeddings(torch.cat([prompt, completion], dim=1), rollout.mask)
            (gradient,) = torch.autograd.grad(total.sum(), completion)
        total = total.detach()
        gradient = gradient.masked_fill(total.isnan().view(-1, 1, 1), 0)  # who abstains moves nothing
        return Scores(total, {self.name: total}, [Adjoint(gradient, table)])

    def relaxed(self, rollout: RelaxedRollout) -> Scores:
        """Scores of the prompt's tokens and the completion's soft ones."""
        table = self.table()
        embeddings = torch.cat([table[rollout.prompt_ids], rollout.embed(table)], dim=1)
        total = self.score_embeddings(embeddings, rollout.mask)
        return Scores(total, {self.name: total})


class WeightedSum(Reward):
    """Several rewards, added with weights.

    Where one of them abstains the others count alone. Differentiable when all of them are.

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
        """Load every part."""
        for reward in self.parts:
            reward.load(tokenizer, vocabulary)

    @property
    def parts(self) -> list[Reward]:
        """The rewards that are added."""
        return [reward for reward in self.rewards if isinstance(reward, Reward)]

    def forward(self, rollout: Rollout) -> Tensor:
        """The weighted sum."""
        return self.score(rollout).total

    def score(self, rollout: Rollout) -> Scores:
        """The weighted sum and each part."""
        return self._add([reward.score(rollout) for reward in self.parts])

    def pathwise(self, rollout: Rollout) -> Scores:
        """The weighted sum, each part, and the gradients of all."""
        for reward in self.parts:
            if not reward.differentiable:
                reward.pathwise(rollout)  # says what to do instead
        return self._add([reward.pathwise(rollout) for reward in self.parts])

    def relaxed(self, rollout: RelaxedRollout) -> Scores:
        """The weighted sum and each part, with their graphs."""
        return self._add([reward.relaxed(rollout) for reward in self.parts])

    def _add(self, scores: list[Scores]) -> Scores:
        weighted = torch.stack([w * s.total for w, s in zip(self.weights, scores, strict=True)])
        total = weighted.nansum(0)
        total = total.where(~total.isnan(), torch.inf)  # of +∞ and −∞: a mistake, and no abstention
        total = total.masked_fill(weighted.isnan().all(0), torch.nan)
        parts: dict[str, Tensor] = {}
        for score in scores:
            for name, value in score.parts.items():
                parts[unique_name(name, parts)] = value
        adjoints = [
            Adjoint(w * part.gradient, part.table)
            for w, score in zip(self.weights, scores, strict=True)
            for part in score.adjoints
        ]
        return Scores(total, parts, adjoints)
