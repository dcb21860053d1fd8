"""Judges of pairs: how likely one completion of a prompt is preferred to another."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from grade_lightning.errors import InputError, check_range
from grade_lightning.records import Experience, Rollout

from .base import Reward
from .functions import FunctionReward
from .judge import JudgeReward
from .remote_judge import RemoteJudge
from .rubric import COMPLETION, PROMPT, Rubric

OTHER = "{other}"
QUESTION = (
    "Prompt:\n{prompt}\n\nFirst response:\n{other}\n\nSecond response:\n{completion}\n\n"
    "Is the second response better than the first? Answer with yes or no.\nAnswer:"
)


class PairwiseJudge(nn.Module, ABC):
    """Prefers completions to others of their prompt. Preferences need not be transitive.

    Subclass it in your own package and name it by its dotted path.
    """

    @property
    def name(self) -> str:
        """What it is called in an error."""
        return type(self).__name__

    def load(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
        """Read weights, with the policy's tokenizer and number of logits; called before each stage."""

    @abstractmethod
    def forward(self, one: Rollout, two: Rollout) -> Tensor:
        """P(one ≻ two) of each row, (b,), without a graph; NaN to abstain. P(two ≻ one) is 1 less that."""

    def table(self, seen: Experience, size: int) -> Tensor:
        """P(i ≻ j) among the completions of each prompt, (P, G, G): 1/2 on the diagonal, with P(j ≻ i) = 1 − P(i ≻ j).

        Args:
            seen: completions, those of a prompt one after another, with their scores.
            size: completions of each prompt, G.

        Raises:
            InputError: the judge gives something else than probabilities.
        """
        first, second = torch.triu_indices(size, size, 1)
        starts = torch.arange(0, len(seen.rollout.ids), size).unsqueeze(1)
        with torch.no_grad():
            won: Tensor = self(*(seen.rollout.select((starts + places).flatten()) for places in (first, second)))
        if bool(((won < 0) | (won > 1)).logical_and(won.isfinite()).any()):
            raise InputError(f"{self.name}: gives {won.tolist()!r:.60}; a preference is a probability, from 0 to 1")
        won = won.view(len(starts), -1)
        table = won.new_full((len(starts), size, size), 0.5)
        table[:, first, second], table[:, second, first] = won, 1 - won
        return table


class RewardPreference(PairwiseJudge):
    """σ((R(one) − R(two)) / temperature): the odds of Bradley and Terry. It is transitive.

    Args:
        reward: R; by default the method's own, whose scores are at hand.
        temperature: in units of the reward; the smaller, the surer.
    """

    def __init__(self, reward: Reward | None = None, temperature: float = 1.0) -> None:
        super().__init__()
        check_range("(0, inf)", "pairwise_judge", temperature=temperature)
        self.reward = reward
        self.temperature = temperature

    def load(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
        """Load the reward."""
        if self.reward is not None:
            self.reward.load(tokenizer, vocabulary)

    def forward(self, one: Rollout, two: Rollout) -> Tensor:
        """From the scores of both.

        Raises:
            InputError: there is no reward.
        """
        if self.reward is None:
            raise InputError(f"{self.name}: has no reward to compare rollouts by; give it one")
        first, second = (self.reward.score(rollout).total for rollout in (one, two))
        return self._odds(first, second)

    def table(self, seen: Experience, size: int) -> Tensor:
        """From one score of each completion."""
        scores = (seen.scores if self.reward is None else self.reward.score(seen.rollout)).total.view(-1, size)
        odds = self._odds(scores.unsqueeze(2), scores.unsqueeze(1))
        return odds.masked_fill(torch.eye(size, dtype=torch.bool, device=odds.device), 0.5)

    def _odds(self, one: Tensor, two: Tensor) -> Tensor:
        """Infinite where a score is, which is no sure win but a mistake: a step with it is left out."""
        odds = ((one - two) / self.temperature).sigmoid()
        return odds.masked_fill(one.isinf() | two.isinf(), math.inf)


class FunctionPreference(PairwiseJudge):
    """A Python function `f(prompts, completions, others, **columns) -> list[float | None]`, or `async def f(…)`.

    It returns for each row how likely the completion is preferred to the other one, from 0 to 1; None abstains. Each
    pair is asked for once.

    Args:
        function: the function, or its dotted path in YAML; otherwise as in :class:`FunctionReward`.
        timeout: seconds that a call may take; None: as many as it likes.
    """

    def __init__(self, function: Callable[..., Any], timeout: float | None = None) -> None:
        super().__init__()
        self.call = FunctionReward(function, timeout)

    @property
    def name(self) -> str:
        """The function's."""
        return f"pairwise_judge {self.call.name}"

    def forward(self, one: Rollout, two: Rollout) -> Tensor:
        """Call the function."""
        preferred: Tensor = self.call(replace(one, columns=one.columns | {"others": two.completions}))
        return preferred


class JudgePreference(PairwiseJudge):
    """A language model that is asked whether the second of two completions is better; the mean over both orders.

    Args:
        judge: a :class:`JudgeReward` or a :class:`RemoteJudge`, which says yes or no; its own question is replaced.
        question: with `{completion}` once and, before it, `{other}` and perhaps `{prompt}`.
    """

    def __init__(self, judge: JudgeReward | RemoteJudge, question: str = QUESTION) -> None:
        super().__init__()
        self._before, _, after = question.partition(COMPLETION)
        if self._before.count(OTHER) != 1 or self._before.count(PROMPT) > 1 or question.count(COMPLETION) != 1:
            raise InputError(
                f"question {question!r:.60}: must have {OTHER} once, and {PROMPT} at most once, before one {COMPLETION}"
            )
        judge.rubric = Rubric(PROMPT + COMPLETION + after)
        self.judge = judge

    def load(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
        """Load the judge."""
        self.judge.load(tokenizer, vocabulary)

    def forward(self, one: Rollout, two: Rollout) -> Tensor:
        """Ask in both orders: a judge that favours a place favours neither completion."""
        return (self._second_wins(two, one) + 1 - self._second_wins(one, two)) / 2

    def _second_wins(self, first: Rollout, second: Rollout) -> Tensor:
        shown = replace(second)
        pairs = zip(second.prompts, first.completions, strict=True)
        shown.prompts = [self._begin(*pair) for pair in pairs]  # in place of what would be decoded
        answer: Tensor = self.judge(shown)
        return answer

    def _begin(self, prompt: str, other: str) -> str:
        """The question up to the completion; braces in a prompt are text."""
        parts = [text.split(PROMPT) for text in self._before.split(OTHER)]
        return other.join(prompt.join(part) for part in parts)
