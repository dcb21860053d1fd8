"""KL divergences between the policy and its reference: estimates from sampled tokens, exact values, cotangents.

The estimates are of KL(π‖π_ref) from tokens that π sampled, as functions of d = log π(y) − log π_ref(y).

References:
    | Approximating KL Divergence (Schulman, 2020), http://joschu.net/blog/kl-approx.html
"""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor


def k1(log_ratio: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """d: unbiased, of either sign.

    Example:
        >>> import torch
        >>> k1(torch.tensor(0.5).log() - torch.tensor(0.25).log())
        tensor(0.6931)
    """
    return log_ratio


def k2(log_ratio: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """d²/2: biased in its value, never negative; its gradient is that of the KL.

    Example:
        >>> import torch
        >>> k2(torch.tensor(0.5).log() - torch.tensor(0.25).log())
        tensor(0.2402)
    """
    return log_ratio.square() / 2


def k3(log_ratio: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """e^−d − 1 + d: unbiased in its value, never negative; its gradient is that of the forward KL(π_ref‖π).

    Example:
        >>> import torch
        >>> k3(torch.tensor(0.5).log() - torch.tensor(0.25).log())
        tensor(0.1931)
    """
    return (-log_ratio).expm1() + log_ratio


ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}


def categorical_kl(logps: Float[Tensor, "*batch v"], ref_logps: Float[Tensor, "*batch v"]) -> Float[Tensor, "*batch"]:
    """Exact KL(π‖π_ref) of categorical distributions, in nats.

    Args:
        logps: normalised log-probabilities of the policy.
        ref_logps: those of the reference.

    Example:
        >>> import torch
        >>> categorical_kl(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log())
        tensor(0.1438)
    """
    return (logps.exp() * (logps - ref_logps)).sum(-1)


def kl_cotangent(
    logps: Float[Tensor, "*batch v"], ref_logps: Float[Tensor, "*batch v"], kl: Float[Tensor, "*batch"]
) -> Float[Tensor, "*batch v"]:
    """Gradient of KL(π‖π_ref) with respect to the policy's logits: p ⊙ (log p − log q − KL).

    Example:
        >>> import torch
        >>> p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
        >>> kl_cotangent(p, q, categorical_kl(p, q)).sum().abs() < 1e-6
        tensor(True)
    """
    return logps.exp() * (logps - ref_logps - kl.unsqueeze(-1))


def kl_reference_cotangent(
    logps: Float[Tensor, "*batch v"], ref_logps: Float[Tensor, "*batch v"]
) -> Float[Tensor, "*batch v"]:
    """Gradient of KL(π‖π_ref) with respect to the reference's logits: q − p.

    Example:
        >>> import torch
        >>> kl_reference_cotangent(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log())
        tensor([-0.2500,  0.2500])
    """
    return ref_logps.exp() - logps.exp()


def later(values: Float[Tensor, "b t"]) -> Float[Tensor, "b t"]:
    """Sum of what follows each position, without the position itself.

    Example:
        >>> import torch
        >>> later(torch.tensor([[1.0, 2.0, 3.0]]))
        tensor([[5., 3., 0.]])
    """
    return values.flip(-1).cumsum(-1).flip(-1) - values
