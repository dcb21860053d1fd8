"""KL divergences between the policy and its reference, and their cotangents."""

from jaxtyping import Float
from torch import Tensor


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
