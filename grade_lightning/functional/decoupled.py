"""Right and wrong completions of a prompt, each weighed among their own kind."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def softmax_among(values: Float[Tensor, "p g"], members: Bool[Tensor, "p g"]) -> Float[Tensor, "p g"]:
    """Softmax over the members of each group; 0 for the others, and in groups without any.

    Example:
        >>> softmax_among(torch.tensor([[1.0, 1.0, 9.0]]), torch.tensor([[True, True, False]]))
        tensor([[0.5000, 0.5000, 0.0000]])
    """
    return values.masked_fill(~members, -torch.inf).softmax(-1).nan_to_num(nan=0.0).masked_fill(~members, 0)


def decoupled(
    rewards: Float[Tensor, "p g"],
    lengths: Float[Tensor, "p g"],
    longest: int,
    threshold: float = 0.5,
    temperature: float = 0.1,
) -> Float[Tensor, "p g"]:
    """ω for what is right, a softmax of (1 − length / longest) / temperature over the right ones; −1 for what is wrong.

    0 in groups that have only one kind. The weights of the wrong ones depend on the policy as it is: :func:`hardness`.

    Args:
        rewards: NaN where there is no reward.
        lengths: tokens of each completion.
        longest: tokens that a completion may have.
        threshold: a reward of this or more is right.
        temperature: the smaller, the more the short ones are preferred; infinite: all the same.

    References:
        | DRPO: Efficient Reasoning via Decoupled Reward Policy Optimization (Li et al., 2025),
          https://arxiv.org/abs/2510.04474

    Example:
        >>> decoupled(torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([[5.0, 5.0, 9.0]]), longest=10)
        tensor([[ 0.5000,  0.5000, -1.0000]])
    """
    right, wrong = rewards >= threshold, rewards < threshold
    found = softmax_among((1 - lengths / longest) / temperature, right) - wrong.to(rewards.dtype)
    both = right.any(-1, keepdim=True) & wrong.any(-1, keepdim=True)
    return found.masked_fill(~both, 0)


def hardness(
    scores: Float[Tensor, "p g"], wrong: Bool[Tensor, "p g"], temperature: float = 10.0
) -> Float[Tensor, "p g"]:
    """The softmax over the wrong ones of s / T, and 1 for all others: the gradient of T log mean exp(s / T).

    Args:
        scores: mean log-probability of each completion's tokens.
        wrong: which completions are wrong.
        temperature: the smaller, the more the likely ones count; infinite: all the same.

    Example:
        >>> hardness(torch.tensor([[-1.0, -1.0, -3.0]]), torch.tensor([[True, True, False]]))
        tensor([[0.5000, 0.5000, 1.0000]])
    """
    return torch.where(wrong, softmax_among(scores / temperature, wrong), 1.0)
