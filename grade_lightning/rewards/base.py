"""What a reward is: a scalar of prompt and completion, differentiable in the completion's tokens or not."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from grade_lightning.errors import InputError
from grade_lightning.records import RelaxedRollout, Rollout, Scores


class Reward(nn.Module, ABC):
    """Scores prompt + completion: the same span of text in training, validation and testing.

    A scalar reward implements :meth:`forward`. A :class:`DifferentiableReward` can also be used by the methods that
    backpropagate through it. Subclass either in your own package and name it by its dotted path.
    """

    differentiable = False
    reads_prefixes = False
    """Whether it can score what stands before each token, as :meth:`with_prefixes` does."""

    @property
    def name(self) -> str:
        """Under which it is logged, as `rewards/{name}`."""
        return type(self).__name__

    @property
    def context_length(self) -> int | None:
        """The longest prompt + completion that it reads, in the policy's tokens; None: any."""
        return None

    def figures(self) -> dict[str, float]:
        """What is logged of a training step beside the scores, by name; a name with a slash as it is."""
        return {}

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

    def begin(self, rollout: Rollout) -> Callable[[], Scores]:
        """Begin to score; what is returned waits for the scores.

        A reward that waits for something, such as a server, goes on in the background, so that the next completions
        are drawn meanwhile (see `at_once` of :class:`.Sampler`). Any other is done when this returns.
        """
        scores = self.score(rollout)
        return lambda: scores

    def with_prefixes(self, rollout: Rollout) -> Scores:
        """Scores, and the reward of what stands before each token.

        Raises:
            InputError: it scores whole texts alone.
        """
        raise InputError(
            f"reward {self.name}: does not score the beginnings of texts, of which PrefixCredit makes its baseline; "
            "use a ClassifierReward or SequenceClassifierReward of the policy's vocabulary on a causal model, or "
            "another credit"
        )

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
            "ClassifierReward or SequenceClassifierReward of the policy's vocabulary (grade-fit --model RewardModel "
            "trains one)"
        )
