"""Rewards for those who help others: how much better a frozen actor does with the completion in its prompt."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from grade_lightning.errors import InputError, check_range
from grade_lightning.numerics import forked_generators, hash_seed
from grade_lightning.records import Rollout

from .base import Reward

PROMPT, COMPLETION = "{prompt}", "{completion}"
REMEMBERED = 100_000
"""Prompts whose scores without help are kept."""


class ImprovementReward(Reward):
    """The reward of an actor's answer with the completion in its prompt, less that of its answer without.

    The policy learns to write what helps the actor: reflections on a failed try, hints, plans. The actor stays as it
    is. What it scores without help is found once for each prompt, with a seed of the prompt's own, so a resumed run
    finds the same.

    Args:
        actor: answers prompts: a function `f(prompts) -> list[str]`, or its dotted path in YAML.
        reward: scores the answers; it reads the row's columns and the prompt without the completion.
        template: what the actor is asked, with `{prompt}` and `{completion}` once each.
        trials: answers to each question, of which the mean counts.

    References:
        | Retroformer: Retrospective Large Language Agents with Policy Gradient Optimization (Yao et al., 2024),
          https://arxiv.org/abs/2308.02151
    """

    def __init__(
        self,
        actor: Callable[..., Any],
        reward: Reward,
        template: str = "{prompt}\n\n{completion}\n\n",
        trials: int = 1,
    ) -> None:
        super().__init__()
        check_range("[1, inf)", "reward", trials=trials)
        if template.count(PROMPT) != 1 or template.count(COMPLETION) != 1:
            raise InputError(f"template {template!r:.60}: must have {PROMPT} and {COMPLETION} once each")
        self.actor = actor
        self.reward = reward
        self.template = template
        self.trials = trials
        self._known: OrderedDict[str, float] = OrderedDict()

    @property
    def name(self) -> str:
        """`improvement`."""
        return "improvement"

    def load(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
        """Load the reward of the answers."""
        self.reward.load(tokenizer, vocabulary)

    def forward(self, rollout: Rollout) -> Tensor:
        """Differences, (B,); NaN where the reward abstains on one of the answers."""
        helped = self._scores(
            rollout, [self._ask(*pair) for pair in zip(rollout.prompts, rollout.completions, strict=True)]
        )
        self._learn(rollout)
        alone = torch.tensor([self._known[prompt] for prompt in rollout.prompts]).to(helped)
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return helped - alone

    def _ask(self, prompt: str, completion: str) -> str:
        """Braces in either are text."""
        parts = [part.split(COMPLETION) for part in self.template.split(PROMPT)]
        return prompt.join(completion.join(part) for part in parts)

    def _learn(self, rollout: Rollout) -> None:
        """What the actor scores without help, for prompts that are new."""
        rows = {prompt: row for row, prompt in enumerate(rollout.prompts) if prompt not in self._known}
        for prompt, row in rows.items():
            with forked_generators(rollout.ids.device):
                torch.manual_seed(hash_seed("improvement", prompt))
                self._known[prompt] = float(self._scores(rollout.select(torch.tensor([row])), [prompt]))

    def _scores(self, rollout: Rollout, questions: list[str]) -> Tensor:
        """Mean reward of the actor's answers, as if they were the completions."""
        found = []
        for _ in range(self.trials):
            answers = self.actor(questions)
            if len(answers) != len(questions) or not all(isinstance(answer, str) for answer in answers):
                raise InputError(
                    f"reward {self.name}: the actor must return a text for each of {len(questions)} prompts"
                )
            found.append(self.reward(_answered(rollout, answers)))
        return torch.stack(found).mean(0)


def _answered(rollout: Rollout, answers: list[str]) -> Rollout:
    """The prompts with other completions, each with its end."""
    tokenizer, device = rollout.tokenizer, rollout.completion_ids.device
    end = rollout.eos_ids[:1] or [tokenizer.pad_token_id]
    rows = [torch.tensor([*tokenizer.encode(answer, add_special_tokens=False), *end]) for answer in answers]
    ids = pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id).to(device)
    mask = torch.arange(ids.shape[1], device=device) < torch.tensor(
        [len(row) for row in rows], device=device
    ).unsqueeze(1)
    return Rollout(
        prompt_ids=rollout.prompt_ids,
        prompt_mask=rollout.prompt_mask,
        completion_ids=ids,
        completion_mask=mask,
        engine_logps=None,
        tokenizer=tokenizer,
        columns=rollout.columns,
        eos_ids=rollout.eos_ids,
    )
