"""How far one token's gradient step would move objective and policy: first and second order, of the last layer alone.

A step of plain gradient descent of rate lr on the output weights W, with logits W h: the gradient of A log π_a is
A v hᵀ with the score v = e_a − π (:mod:`.scores`).
"""

from jaxtyping import Float
from torch import Tensor


def objective_change(
    advantages: Float[Tensor, "*b"],
    norms: Float[Tensor, "*b"],
    fishers: Float[Tensor, "*b"],
    hidden: Float[Tensor, "*b"],
    lr: float,
) -> Float[Tensor, "*b"]:
    """m_H = lr A² |v|² n + ½ lr² A³ n² (|v|⁴ − vᵀFv).

    Args:
        advantages: A.
        norms: |v|².
        fishers: vᵀ F v, F = diag(π) − ππᵀ.
        hidden: n = |h|², h the hidden state that the logits are made of.
        lr: learning rate.

    References:
        | CAPO: Stabilizing Policy Gradients for Sample-Efficient Reinforcement Learning in LLM Reasoning
          (Melo et al., 2025), https://arxiv.org/abs/2510.00819
    """
    step = lr * hidden
    return step * advantages.square() * norms + step.square() * advantages**3 * (norms.square() - fishers) / 2


def policy_change(
    advantages: Float[Tensor, "*b"], norms: Float[Tensor, "*b"], hidden: Float[Tensor, "*b"], lr: float
) -> Float[Tensor, "*b"]:
    """m_F = ½ lr² A² n² |v|⁴; arguments as in :func:`objective_change`."""
    return (lr * hidden * advantages * norms).square() / 2
