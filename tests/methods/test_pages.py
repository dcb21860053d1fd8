"""A page for each method: its parts, arguments that exist, and evidence that is on the page it links to."""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from lightning.pytorch import LightningModule

import grade_lightning.methods

PAGES = Path(__file__).parents[2] / "docs" / "methods"
METHODS = {
    name: value
    for name, value in vars(grade_lightning.methods).items()
    if isinstance(value, type) and issubclass(value, LightningModule)
}


def page(name: str) -> Path:
    """Named as the file of the method."""
    return PAGES / f"{Path(inspect.getfile(METHODS[name])).stem}.md"


def section(text: str, heading: str) -> str:
    return text.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def rows(text: str) -> Iterator[list[str]]:
    """The cells of a table, without its head."""
    lines = re.findall(r"^\|.*\|$", text, re.MULTILINE)
    yield from ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:])


def numbers(text: str) -> set[str]:
    return set(re.findall(r"\d+(?:\.\d+)?", text))


def arguments(method: type) -> set[str]:
    """Of the class and of those that its `**kwargs` go to."""
    made = [vars(base)["__init__"] for base in method.__mro__ if "__init__" in vars(base)]
    return {name for init in made for name in inspect.signature(init).parameters}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_its_page(name: str) -> None:
    text = page(name).read_text()
    assert text.startswith(f"# {name}\n\n**Use it when** ")
    assert all(section(text, heading).strip() for heading in ("Formula", "Arguments", "Evidence"))
    assert f"`grade-fit --model {name}`" in text
    assert f"[{name}]({page(name).name})" in (PAGES / "index.md").read_text()


@pytest.mark.parametrize("name", METHODS)
def test_the_arguments_of_a_page_are_those_of_the_method(name: str) -> None:
    told = [argument for row in rows(section(page(name).read_text(), "Arguments")) for argument in row[:1]]
    listed = {argument for cell in told for argument in re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", cell)))}
    assert listed <= arguments(METHODS[name])


@pytest.mark.parametrize("name", METHODS)
def test_the_evidence_of_a_page_is_on_the_page_that_it_links_to(name: str) -> None:
    for cells in rows(section(page(name).read_text(), "Evidence")):
        link = re.search(r"\]\(([^)#]+\.md)", cells[0])
        if link:
            there = (PAGES / link[1]).read_text()
            assert numbers(cells[1]) <= numbers(there), f"{name}: {cells}"


def test_the_numbers_of_the_index_are_on_the_pages_behind_them() -> None:
    behind = ("../results/methods.md", "../policy_gradients_compared.md", "unbiased.md")
    measured = {number for name in behind for number in numbers((PAGES / name).read_text())}
    cells = [cell for row in rows((PAGES / "index.md").read_text()) for cell in row[2:]]
    assert numbers(" ".join(cells)) <= measured
    assert len(numbers(" ".join(cells))) > 50
