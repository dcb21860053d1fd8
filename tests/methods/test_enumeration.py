"""The table of docs/methods/unbiased.md: which expected updates are exact gradients, and how far off the others are."""

import re
from pathlib import Path

import pytest
import torch

from tests.methods.enumeration import LINES, SEEDS, Found, Line, cell, examine, expected, limit, make_problem, truth
from tests.modules.toys import METHODS

DOCS = Path(__file__).parents[2] / "docs" / "methods" / "unbiased.md"
UNBIASED = {"Reinforce, any fixed baseline", "RLOO", "RLOO, the optimal token baseline", "DrGRPO"}
UNBIASED |= {"Reinforce, with its KL", "RLOO, with its KL"}
QUICK = UNBIASED | {"GRPO", "DRPO"}


def name_of(line: Line) -> str:
    return line.method + (f", {line.note}" if line.note else "")


@pytest.fixture(scope="module")
def table() -> dict[str, list[str]]:
    """The cells of the docs, by line."""
    lines = re.findall(r"^\|.*\|$", DOCS.read_text(), re.MULTILINE)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in rows[2:]}


def inside(found: Found | None, told: str) -> bool:
    """Whether a line of one problem is what the table says of all of them, up to its rounding."""
    if found is None:
        return told == ""
    numbers = [float(x) for x in re.findall(r"-?[\d.]+(?:e[+-]\d+)?", told)]
    if told.startswith("exact"):
        numbers = [1.0, 1.0, *numbers]
    numbers += numbers[-1:] * (4 - len(numbers))
    low, high, short, long = numbers
    return low - 2e-3 <= found.cosine <= high + 2e-3 and 0.94 * short <= found.size <= 1.06 * long


def test_every_policy_gradient_has_a_line(table: dict[str, list[str]]) -> None:
    assert {line.method for line in LINES} == {method.__name__ for method in METHODS}
    assert list(table) == [name_of(line) for line in LINES]
    assert {name for name, cells in table.items() if cells[0].startswith("exact")} >= UNBIASED


@pytest.mark.parametrize("line", [line for line in LINES if name_of(line) in UNBIASED], ids=name_of)
def test_the_unbiased_ones_have_the_exact_gradient(line: Line) -> None:
    """To 1e-10; DrGRPO a third of it: its advantage has (G − 1) / G of RLOO's, and two tokens are the longest."""
    problem = make_problem(SEEDS[1])
    exact = truth(line, problem, problem.logits)
    factor = 1 / 3 if line.method == "DrGRPO" else 1.0
    torch.testing.assert_close(expected(line, problem), factor * exact, rtol=0, atol=1e-10)


def test_drpo_has_the_gradient_of_its_own_objective() -> None:
    """The paper's, differentiated by autograd for every group; it is not that of the expected reward."""
    (line,) = (line for line in LINES if line.method == "DRPO")
    problem = make_problem()
    found = expected(line, problem)
    torch.testing.assert_close(found, limit(line, problem), rtol=0, atol=1e-10)
    assert Found.of(found, truth(line, problem, problem.logits)).cosine < 1 - 1e-6


@pytest.mark.parametrize(
    "line",
    [pytest.param(x, marks=[] if name_of(x) in QUICK else pytest.mark.slow, id=name_of(x)) for x in LINES],
)
def test_the_table_is_what_is_found(line: Line, table: dict[str, list[str]]) -> None:
    """Of the first problem; the ranges of the table are over several."""
    for found, told in zip(examine(line), table[name_of(line)], strict=True):
        assert inside(found, told), (found, told)


def test_what_the_cells_say() -> None:
    assert cell([Found(1.0, 0.5), Found(1.0, 0.5)]) == "exact; × 0.5"
    assert cell([Found(0.91, 2.0), Found(0.9, 1.0), None]) == "0.900 to 0.910; × 1 to 2"
    assert cell([None]) == ""
    assert inside(Found(0.905, 1.5), "0.900 to 0.910; × 1 to 2")
    assert not inside(Found(0.8, 1.5), "0.900 to 0.910; × 1 to 2")
    assert not inside(Found(0.99, 0.5), "exact; × 0.5")
