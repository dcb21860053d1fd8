"""Consistency of the answers to one prompt: their entropy, and what it makes of group rewards."""

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from grade_lightning.functional.advantages import Total, alone, has_spread, mean_and_variance


def answer_entropy(answers: Int[Tensor, "p g"]) -> Float[Tensor, " p"]:
    """Entropy of the answers of each prompt, in bits; −1 is no answer, and does not count.

    Example:
        >>> import torch
        >>> answer_entropy(torch.tensor([[0, 1, 2, 3], [5, 5, 5, 5], [0, 0, 1, 1]]))
        tensor([2., 0., 1.])
    """
    there = answers >= 0
    same = ((answers.unsqueeze(2) == answers.unsqueeze(1)) & there.unsqueeze(1)).sum(-1)  # answers equal to each
    count = there.sum(-1, keepdim=True).clamp(min=1)
    share = same.float().where(there, count) / count
    return -(share.log2() * there).sum(-1) / count.squeeze(-1) + 0.0


def consistent_reward(
    rewards: Float[Tensor, "p g"], entropies: Float[Tensor, " p"], size: Float[Tensor, " p"]
) -> Float[Tensor, " p"]:
    """Mean reward of a prompt × (1 − λ E): a factor of 1 where all answers agree, and 1 / g where all differ.

    Args:
        rewards: of the completions; NaN without one.
        entropies: E, bits.
        size: g, completions with an answer.

    References:
        | COPO: Consistency-Aware Policy Optimization (Han et al., 2025), https://arxiv.org/abs/2508.04138

    Example:
        >>> import torch
        >>> consistent_reward(torch.ones(2, 4), torch.tensor([0.0, 2.0]), torch.tensor([4.0, 4.0]))
        tensor([1.0000, 0.2500])
    """
    scale = (1 - 1 / size.clamp(min=1)) / size.clamp(min=2).log2()
    return rewards.nanmean(-1) * (1 - scale * entropies)


def over_prompts(rewards: Float[Tensor, " p"], eps: float = 1e-6, total: Total = alone) -> Float[Tensor, " p"]:
    """(R − mean) / (std + eps) over the prompts; 0 without a reward.

    Example:
        >>> import torch
        >>> over_prompts(torch.tensor([0.0, 1.0, torch.nan]), eps=0.0)
        tensor([-0.7071,  0.7071,  0.0000])
    """
    mean, variance = mean_and_variance(rewards, ~rewards.isnan(), total)
    return ((rewards - mean) / (variance.sqrt() + eps)).to(rewards.dtype).nan_to_num(nan=0.0)


def local_share(entropies: Float[Tensor, " p"], sharpness: float, threshold: float) -> Float[Tensor, " p"]:
    """Weight of the group's own advantages, σ(k (E − b)): small where the answers agree.

    Args:
        entropies: E, bits.
        sharpness: k.
        threshold: b, bits.

    Example:
        >>> import torch
        >>> local_share(torch.tensor([0.0, 1.0]), sharpness=float("inf"), threshold=0.5)
        tensor([0., 1.])
    """
    return (sharpness * (entropies - threshold)).sigmoid()


class TwoSources(NamedTuple):
    """What :func:`two_sources` finds of each prompt, (P,)."""

    share: Tensor
    """Weight of the group's own advantages."""
    others: Tensor
    """The prompt's reward against that of other prompts."""
    entropies: Tensor
    """Of its answers, bits."""


def two_sources(
    rewards: Float[Tensor, "p g"],
    answers: Int[Tensor, "p g"],
    sharpness: float,
    threshold: float,
    forced: bool = False,
    total: Total = alone,
) -> TwoSources:
    """How much a group learns from its own completions, and what it learns from other prompts.

    Args:
        rewards: of the completions; NaN without one.
        answers: a number for each answer; −1: none.
        sharpness: k of :func:`local_share`.
        threshold: b, bits.
        forced: nothing from its own completions where all of their rewards are equal.
        total: sum over all processes.

    References:
        | COPO: Consistency-Aware Policy Optimization (Han et al., 2025), https://arxiv.org/abs/2508.04138

    Example:
        >>> import torch
        >>> rewards, answers = torch.tensor([[0.0, 1.0], [1.0, 1.0]]), torch.tensor([[0, 1], [2, 2]])
        >>> two_sources(rewards, answers, sharpness=1.0, threshold=1.0)
        TwoSources(share=tensor([0.5000, 0.2689]), others=tensor([-0.7071,  0.7071]), entropies=tensor([1., 0.]))
    """
    entropies = answer_entropy(answers).to(rewards.dtype)
    sizes = (answers >= 0).sum(-1).to(rewards.dtype)
    others = over_prompts(consistent_reward(rewards, entropies, sizes), total=total)
    share = local_share(entropies, sharpness, threshold)
    return TwoSources(share * has_spread(rewards) if forced else share, others, entropies)
