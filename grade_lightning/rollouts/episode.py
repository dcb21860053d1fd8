"""A conversation while it is held, and the rollout that many of them make."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from grade_lightning.errors import InputError
from grade_lightning.policies import Policy
from grade_lightning.records import Prompts, Rollout

from .distribution import Distribution
from .environment import Environment


@dataclass
class Episode:
    """One completion while it is made."""

    environment: Environment
    prompt: list[int]
    turn: int = 0
    tokens: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    """Of each turn that is over; 0 where the environment gave none."""
    error: InputError | None = None
    """What the environment failed with."""
    done: bool = False
    known: bool = True
    """Whether the engine says with which probabilities it drew."""

    def add(self, tokens: list[int], turn: int, sampled: bool, logps: list[float] | None = None) -> None:
        """Append tokens of the policy, or of somebody else."""
        self.tokens += tokens
        self.sampled += [sampled] * len(tokens)
        self.turns += [turn] * len(tokens)
        self.logps += logps or [0.0] * len(tokens)


def padded(rows: list[list[Any]], value: Any, left: bool = False) -> tuple[Tensor, Tensor]:
    """Rows as a tensor, and where it is no padding."""
    longest = max(map(len, rows))
    fill = [[value] * (longest - len(row)) for row in rows]
    joined = [more + row if left else row + more for row, more in zip(rows, fill, strict=True)]
    here = torch.arange(longest) < torch.tensor([len(row) for row in rows]).unsqueeze(1)
    return torch.tensor(joined), here.flip(1) if left else here


def joined(episodes: list[Episode], prompts: Prompts, policy: Policy, distribution: Distribution) -> Rollout:
    """The rollout of conversations that are over, in the order of the prompts.

    Raises:
        InputError: the environment failed in all of them.
    """
    errors = [episode.error for episode in episodes if episode.error is not None]
    if errors and len(errors) == len(episodes):
        raise errors[0] from errors[0].__cause__
    device = prompts.ids.device
    ids, mask = padded([episode.tokens for episode in episodes], policy.tokenizer.pad_token_id)
    sampled, _ = padded([episode.sampled for episode in episodes], False)
    turns, _ = padded([episode.turns for episode in episodes], 0)
    logps, _ = padded([episode.logps for episode in episodes], 0.0)
    return Rollout(
        prompt_ids=prompts.ids,
        prompt_mask=prompts.mask,
        completion_ids=ids.to(device),
        completion_mask=mask.to(device),
        engine_logps=logps.to(device, torch.float32) if all(episode.known for episode in episodes) else None,
        tokenizer=policy.tokenizer,
        columns=prompts.columns
        | {
            "returns": [None if e.error else sum(e.rewards) for e in episodes],
            "turn_rewards": [None if e.error else e.rewards for e in episodes],
        },
        eos_ids=policy.eos_ids,
        stop=list(distribution.stop),
        sampled=sampled.to(device),
        turns=turns.to(device),
    )
