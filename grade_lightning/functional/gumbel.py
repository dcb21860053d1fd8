"""The Gumbel noise that would have produced a given token, and the relaxed token that it makes."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def exponential_noise(
    logps: Float[Tensor, "*batch v"], generator: torch.Generator | None = None
) -> Float[Tensor, "*batch v"]:
    """Draw Exp(1) noise, one value for each entry of `logps`, in float32 or better.

    Args:
        logps: any tensor of the wanted shape and device; its values are not used.
        generator: source of randomness; the global one of the device by default.

    Example:
        >>> exponential_noise(torch.zeros(2, 3, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    dtype = torch.promote_types(logps.dtype, torch.float32)
    return torch.empty(logps.shape, dtype=dtype, device=logps.device).exponential_(generator=generator)


def posterior_scores(
    logps: Float[Tensor, "*batch v"], tokens: Int[Tensor, "*batch"], exponential: Float[Tensor, "*batch v"]
) -> Float[Tensor, "*batch v"]:
    r"""Perturbed log-probabilities s = ℓ + Gumbel noise, drawn given that their argmax is the sampled token.

    Sampling y ~ softmax(ℓ) and then s in this way has the same law as drawing Gumbel noise and taking the
    argmax, so the noise of a token that any sampler drew can be restored afterwards:
    s_y = −log E_y and s_v = −logaddexp(log E_v − ℓ_v, log E_y) for the others.

    Args:
        logps: normalised log-probabilities ℓ of the sampling distribution; −inf for a masked token.
        tokens: the sampled tokens y.
        exponential: Exp(1) noise E (:func:`exponential_noise`).

    Returns:
        The scores s; −inf where `logps` is. The sampled token's score is strictly the largest: where rounding
        ties another token with it, the other is lowered by one unit in the last place.

    References:
        | A* Sampling (Maddison et al., 2014), https://arxiv.org/abs/1411.0030
        | Rao-Blackwellizing the Straight-Through Gumbel-Softmax Gradient Estimator (Paulus et al., 2020),
          https://arxiv.org/abs/2010.04838

    Example:
        >>> logps = torch.tensor([0.7, 0.2, 0.1]).log()
        >>> posterior_scores(logps, torch.tensor(2), exponential_noise(logps)).argmax()
        tensor(2)
    """
    index = tokens.unsqueeze(-1)
    log_noise = exponential.clamp(min=torch.finfo(exponential.dtype).tiny).log()
    winner = -log_noise.gather(-1, index)
    others = -torch.logaddexp(log_noise - logps, -winner)
    below = torch.nextafter(winner, torch.full_like(winner, -torch.inf))
    return torch.minimum(others, below).scatter(-1, index, winner)


def relaxed_tokens(scores: Float[Tensor, "*batch v"], tau: float) -> Float[Tensor, "*batch v"]:
    """Gumbel-softmax: the relaxed one-hot token w = softmax(s / τ).

    References:
        | Categorical Reparameterization with Gumbel-Softmax (Jang et al., 2017),
          https://arxiv.org/abs/1611.01144

    Example:
        >>> relaxed_tokens(torch.tensor([0.0, 0.0]), tau=0.5)
        tensor([0.5000, 0.5000])
    """
    return torch.softmax(scores / tau, dim=-1)


def soft_embeddings(
    weights: Float[Tensor, "*batch k"], indices: Int[Tensor, "*batch k"], table: Float[Tensor, "v w"]
) -> Float[Tensor, "*batch w"]:
    """Weighted means of rows of an embedding table; differentiable in the weights and in the table.

    Args:
        weights: (..., k).
        indices: (..., k): rows of the table; 0 to k − 1 in order where k is the whole vocabulary.
        table: (V, width).

    Returns:
        (..., width), of the table's type.

    Example:
        >>> soft_embeddings(torch.tensor([0.25, 0.75]), torch.tensor([2, 0]), 4 * torch.eye(3))
        tensor([3., 0., 1.])
    """
    weights = weights.to(table.dtype)
    with torch.autocast(table.device.type, enabled=False):  # it would cast the whole table at every step
        if weights.shape[-1] == len(table):
            return weights @ table
        flat, ids = (x.reshape(-1, x.shape[-1]) for x in (weights, indices))
        rows = torch.nn.functional.embedding_bag(ids, table, per_sample_weights=flat, mode="sum")  # no (..., k, width)
    return rows.view(*weights.shape[:-1], -1)
