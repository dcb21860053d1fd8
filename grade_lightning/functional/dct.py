"""A matrix in a few columns of the discrete cosine transform."""

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor


class Compressed(NamedTuple):
    """r columns of the transformed matrix, and which of them they are, in ascending order."""

    values: Tensor
    """(m, r)."""
    columns: Tensor
    """(r,), int64."""


def dct_basis(
    size: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Float[Tensor, "n n"]:
    """The orthogonal matrix whose columns are the cosines of the DCT of type II.

    Example:
        >>> basis = dct_basis(4, torch.float64)
        >>> torch.allclose(basis @ basis.T, torch.eye(4, dtype=torch.float64))
        True
    """
    at = torch.arange(size, dtype=torch.float64, device=device)
    basis = torch.cos(math.pi * at.unsqueeze(1) * (2 * at + 1) / (2 * size)) * math.sqrt(2 / size)
    basis[0] *= math.sqrt(0.5)
    return basis.T.contiguous().to(dtype)


def compress(
    matrix: Float[Tensor, "m n"], basis: Float[Tensor, "n n"], rank: int, norm: Literal["l1", "l2"] = "l2"
) -> Compressed:
    """The r columns of the transformed matrix with the largest norms.

    With `l2` what is left out has the least Frobenius norm of all choices of r columns:
    |G − Ĝ|² = |G|² − |S_r|², S_r the columns that are kept.

    Args:
        matrix: G.
        basis: an orthogonal one.
        rank: r.
        norm: of a column.

    References:
        | FFT-based Dynamic Subspace Selection for Low-Rank Adaptive Optimization of Large Language Models
          (Modoranu et al., 2025), https://arxiv.org/abs/2505.17967

    Example:
        >>> basis = dct_basis(4)
        >>> compress(torch.outer(torch.ones(3), basis[:, 2]), basis, rank=1).columns
        tensor([2])
    """
    whole = matrix @ basis
    sizes = torch.linalg.vector_norm(whole, ord=1 if norm == "l1" else 2, dim=0)
    columns = sizes.topk(rank).indices.sort().values
    return Compressed(whole[:, columns], columns)


def expand(
    values: Float[Tensor, "m r"], columns: Int[Tensor, " r"], basis: Float[Tensor, "n n"]
) -> Float[Tensor, "m n"]:
    """The matrix that has these columns, and zeros for the others.

    Example:
        >>> basis, matrix = dct_basis(3), torch.arange(6.0).view(2, 3)
        >>> torch.allclose(expand(*compress(matrix, basis, rank=3), basis), matrix, atol=1e-6)
        True
    """
    return values @ basis[:, columns].T


def carry_over(values: Num[Tensor, "*m r"], before: Int[Tensor, " r"], now: Int[Tensor, " r"]) -> Num[Tensor, "*m r"]:
    """What was kept for some columns, for other ones: a column that was there before keeps its own, a new one has 0.

    This is the rotation by Q_beforeᵀ Q_now, which for columns of one orthogonal matrix has only zeros and ones.

    Args:
        values: a row for each row of the matrix, or numbers of the columns alone.
        before: columns that they are of, in ascending order.
        now: columns that they are wanted for.

    Example:
        >>> carry_over(torch.tensor([1.0, 2.0]), torch.tensor([0, 3]), torch.tensor([3, 5]))
        tensor([2., 0.])
    """
    place = torch.searchsorted(before, now).clamp(max=len(before) - 1)
    return torch.where(before[place] == now, values[..., place], 0)
