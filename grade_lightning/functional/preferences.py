"""Losses over completions that are compared, or labelled one by one.

h is log π(y|x) − log π_ref(y|x) of a completion, r its reward.
"""

import torch
from jaxtyping import Bool, Float
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


def kto(
    log_ratios: Float[Tensor, " b"],
    desirable: Bool[Tensor, " b"],
    reference_point: Float[Tensor, ""],
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Float[Tensor, " b"]:
    """λ_D (1 − σ(β (h − z₀))) of a desirable completion, λ_U (1 − σ(β (z₀ − h))) of another.

    Args:
        log_ratios: h, summed over the completion.
        desirable: the labels.
        reference_point: z₀, what the policy gains or loses on average; no gradient goes through it.
        beta: how strongly the policy is held to its reference.
        desirable_weight: λ_D.
        undesirable_weight: λ_U.

    References:
        | KTO: Model Alignment as Prospect Theoretic Optimization (Ethayarajh et al., 2024),
          https://arxiv.org/abs/2402.01306

    Example:
        >>> kto(torch.tensor([2.0, 2.0]), torch.tensor([True, False]), torch.tensor(2.0), beta=0.1)
        tensor([0.5000, 0.5000])
    """
    gain = beta * (log_ratios - reference_point.detach())
    return torch.where(desirable, desirable_weight * torch.sigmoid(-gain), undesirable_weight * torch.sigmoid(gain))


def apo_zero_unpaired(
    log_ratios: Float[Tensor, " b"], desirable: Bool[Tensor, " b"], beta: float
) -> Float[Tensor, " b"]:
    """1 − σ(β h) of a desirable completion, σ(β h) of another: KTO with z₀ = 0 and equal weights.

    References:
        | Anchored Preference Optimization and Contrastive Revisions (D'Oosterlinck et al., 2024),
          https://arxiv.org/abs/2408.06266; without pairs it is TRL's

    Example:
        >>> apo_zero_unpaired(torch.tensor([0.0, 0.0]), torch.tensor([True, False]), beta=0.1)
        tensor([0.5000, 0.5000])
    """
    return kto(log_ratios, desirable, log_ratios.new_zeros(()), beta)


def cpl(
    chosen: Float[Tensor, " b"], rejected: Float[Tensor, " b"], alpha: float, bias: float = 1.0
) -> Float[Tensor, " b"]:
    """−log σ(α (S_w − λ S_l)): Bradley-Terry over sums of advantages, which are α log π of the optimal policy.

    Args:
        chosen: S_w: log π of the completion or, to hold the policy to a reference, h.
        rejected: S_l.
        alpha: the temperature α of the policy.
        bias: λ; below 1 it favours policies that are likely on the data. With h and λ = 1 this is DPO.

    References:
        | Contrastive Preference Learning: Learning from Human Feedback without RL (Hejna et al., 2023),
          https://arxiv.org/abs/2310.13639

    Example:
        >>> one, two = torch.tensor([-1.0]), torch.tensor([-2.0])
        >>> cpl(one, two, alpha=1.0), cpl(one, two, alpha=1.0, bias=0.5)
        (tensor([0.3133]), tensor([0.6931]))
    """
    return -logsigmoid(alpha * (chosen - bias * rejected))


def online_ipo(
    log_ratios: Float[Tensor, "prompts g"], wins: Float[Tensor, "prompts g"], beta: float
) -> Float[Tensor, " prompts"]:
    """Mean over the pairs of a prompt's completions of (h_i − h_j − (P_i − P_j) / β)².

    P_i is how often completion i beats one of the policy's own: the mean of P(i ≻ k) over all completions k of the
    prompt, of which P(i ≻ i) is 1/2. With two completions P_i − P_j is P(i ≻ j) − 1/2.

    Args:
        log_ratios: h, of each of g ≥ 2 completions.
        wins: P_i.
        beta: how strongly the policy is held to its reference.

    References:
        | Human Alignment of Large Language Models through Online Preference Optimisation (Calandriello et al., 2024),
          https://arxiv.org/abs/2403.08635
        | the target with P_i − P_j: Extragradient Preference Optimization (Zhou et al., 2025),
          https://arxiv.org/abs/2503.08942

    Example:
        >>> online_ipo(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.6, 0.4]]), beta=0.1)
        tensor([0.])
    """
    gaps = log_ratios - wins / beta  # the mean over pairs of squared differences is twice the unbiased variance
    return 2 * gaps.var(-1)
