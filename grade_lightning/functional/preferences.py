"""Losses over pairs of completions, of which one is preferred.

h is log π(y|x) − log π_ref(y|x) of a completion, r its reward.
"""

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid


def dpo(
    chosen: Float[Tensor, " b"], rejected: Float[Tensor, " b"], beta: float, label_smoothing: float = 0.0
) -> Float[Tensor, " b"]:
    """−log σ(β (h_w − h_l)), h summed over the completion.

    Args:
        chosen: h_w.
        rejected: h_l.
        beta: how strongly the policy is held to its reference.
        label_smoothing: the probability that a label is wrong (the conservative variant).

    References:
        | Direct Preference Optimization: Your Language Model is Secretly a Reward Model (Rafailov et al., 2023),
          https://arxiv.org/abs/2305.18290

    Example:
        >>> import torch
        >>> dpo(torch.tensor([0.0]), torch.tensor([0.0]), beta=0.1)
        tensor([0.6931])
    """
    margin = beta * (chosen - rejected)
    return -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)


def bradley_terry(
    chosen: Float[Tensor, " b"], rejected: Float[Tensor, " b"], margin: Float[Tensor, " b"] | float = 0.0
) -> Float[Tensor, " b"]:
    """−log σ(r_w − r_l − m): the log-odds that the preferred one wins are the difference of the rewards.

    Args:
        chosen: r_w.
        rejected: r_l.
        margin: m, by how much the preferred one is better at least.

    References:
        | Rank Analysis of Incomplete Block Designs (Bradley and Terry, 1952)
        | the margin: Llama 2 (Touvron et al., 2023), https://arxiv.org/abs/2307.09288

    Example:
        >>> import torch
        >>> bradley_terry(torch.tensor([2.0]), torch.tensor([1.0]), 1.0)
        tensor([0.6931])
    """
    return -logsigmoid(chosen - rejected - margin)


def centring(chosen: Float[Tensor, " b"], rejected: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """(r_w + r_l)²: pairs say nothing of where 0 is; this puts it between them.

    References:
        | Helping or Herding? (Eisenstein et al., 2023), https://arxiv.org/abs/2312.09244

    Example:
        >>> import torch
        >>> centring(torch.tensor([2.0]), torch.tensor([-1.0]))
        tensor([1.])
    """
    return (chosen + rejected).square()


def ipo(chosen: Float[Tensor, " b"], rejected: Float[Tensor, " b"], beta: float) -> Float[Tensor, " b"]:
    """(h_w − h_l − 1 / (2β))²: the margin is pulled to a finite value instead of to infinity.

    References:
        | A General Theoretical Paradigm to Understand Learning from Human Preferences (Azar et al., 2023),
          https://arxiv.org/abs/2310.12036

    Example:
        >>> import torch
        >>> ipo(torch.tensor([5.0]), torch.tensor([0.0]), beta=0.1)
        tensor([0.])
    """
    return (chosen - rejected - 1 / (2 * beta)).square()
