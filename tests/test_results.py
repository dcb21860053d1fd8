"""The index of the results says what its pages say."""

import re
from pathlib import Path

import pytest

PAGES = Path(__file__).parents[1] / "docs" / "results"
LINES = re.findall(r"^\| \[.*\]\((\S+?\.md)\S*\) \| (.*) \|$", (PAGES / "index.md").read_text(), re.MULTILINE)


def test_there_are_answers() -> None:
    assert len(LINES) > 12


@pytest.mark.parametrize(("page", "answer"), LINES, ids=[page for page, _ in LINES])
def test_the_numbers_of_an_answer_are_on_its_page(page: str, answer: str) -> None:
    def numbers(text: str) -> set[str]:
        return set(re.findall(r"\d+\.\d+", text))

    assert numbers(answer) <= numbers((PAGES / page).read_text())
