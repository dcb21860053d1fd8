"""GRADE-STE by replay: the adjoint of sampled tokens, without unrolling the sampler.

The forward values of a straight-through sampler are those of ordinary sampling, so only its backward pass is
special. Sample first; then one teacher-forced pass gives the logits ℓ_t as a function of the inputs x. A token
y_t enters the objective through the reward model's input and through the policy's next input x_{t+1}; with
b the direct part, E the policy's embedding table and VJP the way from a token's adjoint to the inputs,

    a = b + shift(E · VJP_x(a)).

The network is causal, so the operator is nilpotent and iterating it T − 1 times is exact; each iteration is one
backward pass over the whole sequence with respect to its inputs only.
"""

import operator
from collections.abc import Callable, Sequence
from functools import reduce
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.profiler import record_function

from grade_lightning.functional.vocabulary import Vocabulary


class Adjoint(NamedTuple):
    """A gradient with respect to the embeddings of tokens, and the table that embeds them.

    The gradient with respect to the one-hot token t is `gradient[t] @ table.T`; kept apart, only tensors of
    embedding width need to live.
    """

    gradient: Float[Tensor, "*n w"]
    table: Float[Tensor, "v w"]

    def __call__(self, rows: slice = slice(None)) -> Float[Tensor, "*n v"]:
        """The gradient with respect to the one-hot tokens, in float32 or better."""
        product = self.gradient[rows].to(self.table.dtype) @ self.table.mT
        return product.to(torch.promote_types(product.dtype, torch.float32))


Cotangent = Callable[[Tensor, slice, Tensor], Tensor]
"""Maps logits of some positions (m, v), which they are, and their tokens' adjoint (m, v) to a cotangent (m, v)."""


class Replay(NamedTuple):
    """Result of :func:`replay`."""

    cotangent: Callable[[Tensor, slice], Tensor]
    """Gradient of the objective with respect to the logits of some positions."""
    residual: Float[Tensor, ""]
    """Relative change of the adjoint in the last hop; NaN when there was none."""


def next_input_gradient(gradient: Float[Tensor, "b l w"], length: int) -> Float[Tensor, "b t w"]:
    """Align a gradient at the inputs with the tokens: the input after position t is token t.

    Args:
        gradient: gradient with respect to the L = P + T − 1 inputs (prompt and all completion tokens but the last), or
            to the T − 1 of the completion.
        length: T, the number of completion tokens.

    Returns:
        The gradient for each completion token; zero for the last, which is no input.

    Example:
        >>> next_input_gradient(torch.arange(4.0).view(1, 4, 1), length=3).flatten()  # P = 2, T = 3
        tensor([2., 3., 0.])
    """
    prompt = gradient.shape[1] - length + 1
    return torch.nn.functional.pad(gradient[:, prompt:], (0, 0, 0, 1))


@record_function("hops")
def replay(
    vocabulary: Vocabulary,
    inputs: Float[Tensor, "b l w"] | None,
    table: Float[Tensor, "v w"],
    direct: Sequence[Adjoint],
    cotangent: Cotangent,
    valid: Int[Tensor, " n"],
    length: int,
    hops: int,
    tolerance: float = 0.0,
    source: Callable[[Tensor, slice], Tensor] | None = None,
) -> Replay:
    """Solve for the adjoint of the sampled tokens and return the gradient with respect to the logits.

    Nothing is divided by the batch size, so that half-precision gradients of single sequences do not underflow.

    Args:
        vocabulary: the n valid positions, with the graph of their hidden states; kept alive.
        inputs: input embeddings that they were computed from (prompt, then the completion but its last token); must
            require grad. Those of the completion alone are enough, and cheaper where the prompt has a graph of its own.
            Not needed without hops.
        table: the policy's embedding table E: what its embedding module returns for each token id.
        direct: where the tokens enter the objective directly (reward model, reference model), each (n, width).
        cotangent: linear in the adjoint, such as
            :func:`~grade_lightning.functional.estimators.straight_through_gumbel` at fixed noise.
        valid: which of the b·t positions belong to completions; nothing flows through what follows an end.
        length: t, the number of completion tokens.
        hops: number of iterations; T − 1 is exact.
        tolerance: stop once the residual is at most this; 0 runs all hops without looking (no synchronisation).
        source: a further cotangent on the logits that travels to earlier tokens with the hops (exact KL).

    References:
        | GRADE (Nel, 2025), https://arxiv.org/abs/2601.11574. The paper unrolls the sampler; the gradient is the same.

    Example:
        >>> from grade_lightning.functional.estimators import softmax_vjp
        >>> inputs = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]], requires_grad=True)  # P = 1, T = 2
        >>> head = torch.nn.functional.linear  # each token is judged by the token before it
        >>> vocabulary = Vocabulary(inputs[0], head, [2 * torch.eye(2)], size=2)
        >>> reward = [Adjoint(torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.eye(2))]
        >>> both = torch.arange(2)
        >>> backward = lambda logits, rows, adjoint: softmax_vjp(logits.softmax(-1), adjoint)
        >>> flow = [replay(vocabulary, inputs, torch.eye(2), reward, backward, both, 2, hops=k) for k in (0, 1)]
        >>> first = slice(0, 1)
        >>> [bool(step.cotangent(vocabulary.at(first), first).any()) for step in flow]  # one hop carries it there
        [False, True]
    """
    arrived: list[Adjoint] = []

    def at_logits(logits: Tensor, rows: slice) -> Tensor:
        found = cotangent(logits, rows, reduce(operator.add, (part(rows) for part in (*direct, *arrived))))
        return found if source is None else found + source(logits, rows)

    products: dict[tuple[int, int], Tensor] = {}
    dtype = torch.promote_types(vocabulary.hidden.dtype, torch.float32)
    residual = vocabulary.hidden.new_full((), torch.nan, dtype=dtype)
    for hop in range(hops):
        assert inputs is not None
        hidden = vocabulary.pull(at_logits)
        (gradient,) = torch.autograd.grad(vocabulary.hidden, inputs, hidden, retain_graph=True)
        before = list(arrived)
        arrived[:] = [Adjoint(next_input_gradient(gradient, length).flatten(0, 1)[valid], table)]
        if tolerance > 0 or hop == hops - 1:
            change = arrived[0].gradient - before[0].gradient if before else arrived[0].gradient
            residual = _norm([Adjoint(change, table)], products) / _norm([*direct, *before], products)
            if tolerance > 0 and residual <= tolerance:
                break
    return Replay(at_logits, residual)


def _norm(parts: Sequence[Adjoint], products: dict[tuple[int, int], Tensor]) -> Tensor:
    """Norm of the sum of adjoints of one-hot tokens, from products of tables (kept) instead of anything (n, v)."""
    total = torch.zeros((), device=parts[0].gradient.device)
    for i, one in enumerate(parts):
        for j, other in enumerate(parts[: i + 1]):
            key = (id(one.table), id(other.table))
            if key not in products:
                wide = torch.promote_types(one.gradient.dtype, torch.float32)
                products[key] = one.table.to(wide).mT @ other.table.to(wide)
            wide = products[key].dtype
            product = ((one.gradient.to(wide) @ products[key]) * other.gradient.to(wide)).sum()
            total = total + (product if i == j else 2 * product)
    return total.clamp(min=0).sqrt()
