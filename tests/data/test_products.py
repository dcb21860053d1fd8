"""The questions are different; those who ask the calculator say what it says, and those who guess are wrong."""

import re

import pytest

from grade_lightning.data import BundledProducts, generate_products
from grade_lightning.errors import InputError
from grade_lightning.rewards import NumericMatch
from grade_lightning.rollouts import Calculator

ASKED = re.compile(r"( That is <calc>(\d+)\*(\d+)</calc>)( = \d+\n)(The answer is \d+\.)")
GUESSED = re.compile(r" That is (\d+)\*(\d+) = (\d+)\nThe answer is \3\.")


def test_who_asks_says_what_the_calculator_says() -> None:
    """To the letter: what stands in the text is what the environment answers to the part before it."""
    check = NumericMatch(pattern=r"The answer is (\d+)").check
    for row in generate_products(200, seed=3, calls=1.0):
        found = ASKED.fullmatch(row["completion"])
        assert found is not None
        tool = Calculator()
        tool.reset({})
        assert tool.step(found[1])[0][0]["content"] == found[4]
        assert set(re.findall(r"\d+", row["prompt"])) == {found[2], found[3]}
        assert check(found[5], row["answer"]) == 1.0
        assert check(found[1] + found[4], row["answer"]) == 0.0  # the tool's words are no answer
        assert int(row["answer"]) == int(found[2]) * int(found[3])


def test_who_guesses_is_seldom_right() -> None:
    """By the number of digits and the first two of them: one of a thousand, or of ten thousand."""
    rows = generate_products(2_000, seed=3, calls=0.0)
    right = 0
    for row in rows:
        found = GUESSED.fullmatch(row["completion"])
        assert found is not None
        assert len(found[3]) == len(row["answer"])
        assert found[3][:2] == row["answer"][:2]
        right += found[3] == row["answer"]
    assert right < 20


def test_they_ask_as_often_as_is_said() -> None:
    """A share of 0.1 of 4,000 has a standard error of 0.005; six of them are allowed."""
    asked = sum("<calc>" in row["completion"] for row in generate_products(4_000, seed=3, calls=0.1))
    assert abs(asked / 4_000 - 0.1) < 0.03


def test_no_question_is_there_twice_and_a_seed_is_a_set_of_them() -> None:
    rows = generate_products(3_000, seed=3)
    assert len({row["prompt"] for row in rows}) == 3_000
    assert rows == generate_products(3_000, seed=3)
    assert rows != generate_products(3_000, seed=4)
    with pytest.raises(ValueError, match="different products: there are"):
        generate_products(10**8, seed=0)


def test_bundled_products_are_split_and_counted() -> None:
    data = BundledProducts(num_train=40, num_test=20, calls=1.0, seed=5).load()
    assert {split: len(rows) for split, rows in data.items()} == {"train": 40, "test": 20}
    assert not set(data["train"]["prompt"]) & set(data["test"]["prompt"])
    with pytest.raises(InputError, match=r"data\.source: .* products are asked for; there are"):
        BundledProducts(num_train=10**8)
