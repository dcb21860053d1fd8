"""GRADE-STE by replay: the adjoint of sampled tokens, without unrolling the sampler.

The forward values of a straight-through sampler are those of ordinary sampling, so only its backward pass is
special. Sample first; then one teacher-forced pass gives the logits ℓ_t as a function of the inputs x. A token
y_t enters the objective through the reward model's input and through the policy's next input x_{t+1}; with
b the direct part, E the policy's embedding table and VJP the way from a token's adjoint to the inputs,

    a = b + shift(E · VJP_x(a)).

The network is causal, so the operator is nilpotent and iterating it T − 1 times is exact; each iteration is one
backward pass over the whole sequence with respect to its inputs only.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class Adjoint(NamedTuple):
    """A gradient with respect to the embeddings of tokens, and the table that embeds them.

    The gradient with respect to the one-hot token t is `gradient[:, t] @ table.T`; kept apart, only tensors of
    embedding width need to live.
    """

    gradient: Float[Tensor, "b t w"]
    table: Float[Tensor, "v w"]

    def __call__(self) -> Float[Tensor, "b t v"]:
        """The gradient with respect to the one-hot tokens, in float32 or better."""
        product = self.gradient.to(self.table.dtype) @ self.table.mT
        return product.to(torch.promote_types(product.dtype, torch.float32))


class Replay(NamedTuple):
    """Result of :func:`replay`."""

    cotangent: Float[Tensor, "b t v"]
    """Gradient of the objective with respect to the logits; contract it with them to get a surrogate loss."""
    residual: Float[Tensor, ""]
    """Relative change of the adjoint in the last hop; NaN when there was none."""


def next_input_gradient(gradient: Float[Tensor, "b l w"], length: int) -> Float[Tensor, "b t w"]:
    """Align a gradient at the inputs with the tokens: the input after position t is token t.

    Args:
        gradient: gradient with respect to the L = P + T − 1 inputs (prompt and all completion tokens but the last).
        length: T, the number of completion tokens.

    Returns:
        The gradient for each completion token; zero for the last, which is no input.

    Example:
        >>> next_input_gradient(torch.arange(4.0).view(1, 4, 1), length=3).flatten()  # P = 2, T = 3
        tensor([2., 3., 0.])
    """
    prompt = gradient.shape[1] - length + 1
    return torch.nn.functional.pad(gradient[:, prompt:], (0, 0, 0, 1))


def replay(
    logits: Float[Tensor, "b t v"],
    inputs: Float[Tensor, "b l w"],
    table: Float[Tensor, "v w"],
    direct: Sequence[Adjoint],
    cotangent: Callable[[Tensor], Tensor],
    mask: Bool[Tensor, "b t"],
    hops: int,
    tolerance: float = 0.0,
    source: Float[Tensor, "b t v"] | None = None,
) -> Replay:
    """Solve for the adjoint of the sampled tokens and return the gradient with respect to the logits.

    Nothing is divided by the batch size, so that half-precision gradients of single sequences do not underflow.

    Args:
        logits: logits of the completion's positions, with their graph; kept alive.
        inputs: input embeddings that the logits were computed from (prompt, then the completion but its last
            token); must require grad.
        table: the policy's embedding table E: what its embedding module returns for each token id.
        direct: where the tokens enter the objective directly (reward model, reference model).
        cotangent: linear map from a token's adjoint to its logits, such as
            :func:`~grade_lightning.functional.estimators.straight_through_gumbel` at fixed noise.
        mask: true up to and including the end-of-sequence token; nothing flows through positions after it.
        hops: number of iterations; T − 1 is exact.
        tolerance: stop once the residual is at most this; 0 runs all hops without looking (no synchronisation).
        source: a further cotangent on the logits that travels to earlier tokens with the hops (exact KL).

    References:
        | GRADE (Nel, 2025), https://arxiv.org/abs/2601.11574. The paper unrolls the sampler; the gradient is the same.

    Example:
        >>> from grade_lightning.functional.estimators import softmax_vjp
        >>> table = torch.eye(2)
        >>> inputs = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]], requires_grad=True)  # P = 1, T = 2
        >>> logits = 2 * inputs  # each token is judged by the token before it
        >>> probs = logits.detach().softmax(-1)
        >>> reward = [Adjoint(torch.tensor([[[0.0, 0.0], [1.0, 0.0]]]), torch.eye(2))]
        >>> ones = torch.ones(1, 2, dtype=torch.bool)
        >>> backward = lambda a: softmax_vjp(probs, a)
        >>> flow = [replay(logits, inputs, table, reward, backward, ones, hops=k) for k in (0, 1)]
        >>> [bool(step.cotangent[0, 0].any()) for step in flow]  # one hop carries it to the first token
        [False, True]
    """
    keep = mask.unsqueeze(-1)
    direct_adjoint = sum((part() for part in direct), logits.new_zeros(()))
    adjoint = direct_adjoint
    residual = adjoint.new_full((), torch.nan)
    for _ in range(hops):
        hop = cotangent(adjoint) * keep
        if source is not None:
            hop = hop + source
        (gradient,) = torch.autograd.grad(logits, inputs, hop.to(logits.dtype), retain_graph=True)
        arrived = Adjoint(next_input_gradient(gradient, logits.shape[1]), table)()
        previous, adjoint = adjoint, direct_adjoint + arrived
        residual = (adjoint - previous).norm() / previous.norm()
        if tolerance > 0 and residual <= tolerance:
            break
    final = cotangent(adjoint) * keep
    return Replay(final if source is None else final + source, residual)
