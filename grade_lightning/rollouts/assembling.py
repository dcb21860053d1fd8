"""From an engine's answers to a rollout; what an engine may not answer is refused here."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grade_lightning.errors import InputError
from grade_lightning.policies import Policy
from grade_lightning.records import Prompts, Rollout

from .distribution import Distribution


@dataclass(frozen=True)
class Answer:
    """One completion, as an engine with lists of numbers gives it."""

    tokens: Sequence[int]
    """Up to and including the end token, if there is one."""
    logps: Sequence[float]
    """Log-probability of each, in the distribution that it was drawn from."""


def bare(prompts: Prompts) -> list[list[int]]:
    """Token ids of each prompt without padding.

    Example:
        >>> bare(Prompts(torch.tensor([[0, 5], [6, 7]]), torch.tensor([[0, 1], [1, 1]])))
        [[5], [6, 7]]
    """
    rows = zip(prompts.ids.cpu(), prompts.mask.bool().cpu(), strict=True)
    return [row[keep].tolist() for row, keep in rows]


def assembled(
    engine: str, policy: Policy, distribution: Distribution, prompts: Prompts, answers: Sequence[Answer]
) -> Rollout:
    """A rollout of B answers, padded on the right.

    Args:
        engine: its name, for messages.
        policy: whose tokenizer and end tokens the completions have.
        distribution: what was asked for.
        prompts: B prompts.
        answers: B completions in the order of the prompts.

    Raises:
        InputError: an answer is not what the engine was asked for.
    """
    if len(answers) != len(prompts):
        raise InputError(f"{engine}: {len(answers)} completions for {len(prompts)} prompts; {_REMEDY}")
    ends, size = set(policy.eos_ids), policy.anatomy.size
    for row, answer in enumerate(answers):
        wrong = _wrong(answer, distribution, ends, size)
        if wrong:
            raise InputError(f"{engine}: completion {row} {wrong}; {_REMEDY}")
    width = max(len(answer.tokens) for answer in answers)
    device = prompts.ids.device

    def padded(rows: list[Sequence[int]] | list[Sequence[float]], fill: float, dtype: torch.dtype) -> Tensor:
        filled = [[*row, *[fill] * (width - len(row))] for row in rows]
        return torch.tensor(filled, dtype=dtype, device=device)

    lengths = torch.tensor([len(answer.tokens) for answer in answers], device=device)
    pad_id = policy.tokenizer.pad_token_id
    return Rollout(
        prompt_ids=prompts.ids,
        prompt_mask=prompts.mask,
        completion_ids=padded([answer.tokens for answer in answers], pad_id, prompts.ids.dtype),
        completion_mask=torch.arange(width, device=device) < lengths.unsqueeze(1),
        engine_logps=padded([answer.logps for answer in answers], 0.0, torch.float32),
        tokenizer=policy.tokenizer,
        columns=prompts.columns,
        eos_ids=policy.eos_ids,
    )


_REMEDY = "the step was not taken; start the engine again and resume with --ckpt_path"


def _wrong(answer: Answer, distribution: Distribution, ends: set[int], size: int) -> str:
    """What an answer has that was not asked for; empty where nothing is wrong."""
    tokens, count = answer.tokens, len(answer.tokens)
    if not 1 <= count <= distribution.max_new_tokens:
        return f"has {count} tokens instead of 1 to {distribution.max_new_tokens}"
    if len(answer.logps) != count:
        return f"has {count} tokens and {len(answer.logps)} log-probabilities"
    strange = next((token for token in tokens if not 0 <= token < size), None)
    if strange is not None:
        return f"has token {strange}, which the policy's {size} do not include"
    early = next((i for i, token in enumerate(tokens[:-1]) if token in ends), None)
    if early is not None:
        return f"goes on after its end token ({tokens[early]})"
    if tokens[-1] in ends and count <= distribution.min_new_tokens:
        return f"ends with {count} tokens, before min_new_tokens ({distribution.min_new_tokens})"
    if count < distribution.max_new_tokens and tokens[-1] not in ends and not distribution.stop:
        return f"stops after {count} of {distribution.max_new_tokens} tokens, without an end token"
    if not all(-torch.inf < logp <= 1e-4 for logp in answer.logps):
        return "has a log-probability that is none"
    return ""
