"""The columns of a DCT: an orthogonal basis, the best choice, what is left out."""

from itertools import combinations

import pytest
import torch

from grade_lightning.functional.dct import carry_over, compress, dct_basis, expand


@pytest.mark.parametrize("size", [1, 5, 16])
def test_the_basis_is_orthogonal_and_scipys(size: int) -> None:
    fft = pytest.importorskip("scipy.fft")
    basis = dct_basis(size, torch.float64)
    torch.testing.assert_close(basis @ basis.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-14)
    rows = torch.randn(3, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    truth = torch.from_numpy(fft.dct(rows.numpy(), type=2, norm="ortho"))
    torch.testing.assert_close(rows @ basis, truth, rtol=0, atol=1e-13)


def test_l2_leaves_out_the_least_of_all_choices() -> None:
    matrix = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    basis = dct_basis(6, torch.float64)
    values, columns = compress(matrix, basis, 2)
    left = (matrix - expand(values, columns, basis)).square().sum()
    torch.testing.assert_close(left, matrix.square().sum() - values.square().sum())
    every = [torch.tensor(pair) for pair in combinations(range(6), 2)]
    others = [(matrix - expand((matrix @ basis)[:, pair], pair, basis)).square().sum() for pair in every]
    torch.testing.assert_close(left, torch.stack(others).min())


def test_the_norms_choose_differently() -> None:
    """A column of one large number against one of several middling ones."""
    transformed = torch.tensor([[3.0, 1.6], [0.0, 1.6], [0.0, 1.6]])
    basis = dct_basis(2)
    chosen = [compress(transformed @ basis.T, basis, 1, norm).columns.item() for norm in ("l1", "l2")]
    assert chosen == [1, 0]


def test_carrying_over_is_the_rotation_between_the_two_bases() -> None:
    basis, values = dct_basis(7, torch.float64), torch.arange(1.0, 7.0, dtype=torch.float64).view(2, 3)
    before, now = torch.tensor([0, 2, 5]), torch.tensor([2, 5, 6])
    rotated = values @ basis[:, before].T @ basis[:, now]
    torch.testing.assert_close(carry_over(values, before, now), rotated, rtol=0, atol=1e-12)
