"""Groups of completions as tables: uniform, ragged, in any order; advantages of each as if it were alone."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from grade_lightning.functional.advantages import group_centred, group_standardised, has_spread, leave_one_out
from grade_lightning.functional.groups import Groups, group_by

LABELS = {
    "uniform": [0, 0, 0, 1, 1, 1, 2, 2, 2],
    "one, three and four": [0, 1, 1, 1, 2, 2, 2, 2],
    "in any order": [7, -2, 40, 7, 7, 40, -2, 40, 7],
    "each by itself": [3, 1, 2],
    "one group": [5, 5, 5, 5],
}
layouts = pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
sizes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def values_of(labels: list[int], dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(labels), dtype=torch.float64, generator=generator).to(dtype)


def members(labels: list[int]) -> list[list[int]]:
    """The rows of each group, by a loop; the groups in the order of their labels."""
    return [[i for i, own in enumerate(labels) if own == label] for label in sorted(set(labels))]


@layouts
def test_groups_against_loops(labels: list[int]) -> None:
    """Row: which label in order; column: how many of the same label stand before; NaN where there is nobody."""
    groups, rows = group_by(torch.tensor(labels)), members(labels)
    assert groups.shape == (len(rows), max(map(len, rows)))
    assert groups.row.tolist() == [next(p for p, row in enumerate(rows) if i in row) for i in range(len(labels))]
    assert groups.column.tolist() == [labels[:i].count(label) for i, label in enumerate(labels)]
    values = values_of(labels)
    table = groups.table(values)
    assert table.shape == groups.shape
    for p, row in enumerate(rows):
        assert torch.equal(table[p, : len(row)], values[row])
        assert table[p, len(row) :].isnan().all()


@layouts
@sizes
def test_rows_are_the_inverse_of_the_table(labels: list[int], dtype: torch.dtype) -> None:
    """To the bit, of a reward that abstains as well."""
    groups, values = group_by(torch.tensor(labels)), values_of(labels, dtype)
    values[1] = torch.nan
    found = groups.rows(groups.table(values))
    assert found.dtype == dtype
    torch.testing.assert_close(found, values, rtol=0, atol=0, equal_nan=True)


def test_a_uniform_table_is_a_view_of_the_values() -> None:
    values = values_of(LABELS["uniform"])
    assert torch.equal(group_by(torch.tensor(LABELS["uniform"])).table(values), values.view(3, 3))


def test_only_which_labels_are_equal_matters_and_their_order() -> None:
    labels = torch.tensor(LABELS["in any order"])
    assert_same(group_by(3 * labels - 100), group_by(labels))
    assert_same(group_by(labels.int()), group_by(labels))
    flipped = group_by(-labels)
    assert torch.equal(flipped.row, 2 - group_by(labels).row)
    assert torch.equal(flipped.column, group_by(labels).column)


def assert_same(found: Groups, truth: Groups) -> None:
    assert torch.equal(found.row, truth.row)
    assert torch.equal(found.column, truth.column)
    assert found.shape == truth.shape


@pytest.mark.parametrize(
    "function",
    [group_centred, leave_one_out, group_standardised, partial(group_standardised, eps=0.0)],
    ids=["centred", "leave one out", "standardised", "without eps"],
)
@layouts
@sizes
def test_advantages_of_a_padded_table_are_those_of_each_group_alone(
    labels: list[int], function: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    """To the bit: what pads the table counts in no mean, no deviation and no number of completions."""
    for seed in range(5):
        groups, values = group_by(torch.tensor(labels)), values_of(labels, dtype, seed)
        found = groups.rows(function(groups.table(values)))
        for row in members(labels):
            alone = function(values[row].unsqueeze(0)).squeeze(0)
            torch.testing.assert_close(found[row], alone, rtol=0, atol=0, equal_nan=True)


@layouts
def test_the_spread_of_a_padded_table_is_that_of_each_group_alone(labels: list[int]) -> None:
    values = torch.tensor(labels).double().add(0.1 * (torch.arange(len(labels)) == 3))
    found = has_spread(group_by(torch.tensor(labels)).table(values))
    truth = [len(set(values[row].tolist())) > 1 for row in members(labels)]
    assert found.tolist() == truth


def test_gradients_go_through_a_table() -> None:
    """Of the completions that are there; the padding has none to lose."""
    labels = LABELS["one, three and four"]
    groups, values = group_by(torch.tensor(labels)), values_of(labels).requires_grad_()
    weights = values_of(labels, seed=1)
    (found,) = torch.autograd.grad((groups.rows(groups.table(values)) * weights).sum(), values)
    assert torch.equal(found, weights)


@layouts
def test_what_is_known_of_prompts_is_spread_over_their_completions(labels: list[int]) -> None:
    """In the order of the completions, of any type."""
    groups = group_by(torch.tensor(labels))
    known = torch.tensor(sorted(set(labels)))
    assert groups.spread(known).tolist() == labels
    assert groups.spread(known > known[0]).dtype == torch.bool


def test_no_completions_are_no_groups() -> None:
    groups = group_by(torch.zeros(0, dtype=torch.int64))
    assert groups.shape == (0, 0)
    assert groups.table(torch.zeros(0)).shape == (0, 0)
    assert groups.rows(torch.zeros(0, 0)).shape == (0,)
