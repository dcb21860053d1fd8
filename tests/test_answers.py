"""Answers: the last line, and the same number for the same answer alone."""

from grade_lightning.answers import answer_numbers, last_line


def test_the_answer_is_the_last_line() -> None:
    assert [last_line(text) for text in ("a\nB ", "  ", "x\n\n y\n")] == ["b", "", "y"]


def test_equal_answers_have_equal_numbers_and_empty_ones_have_none() -> None:
    texts = ["one\nB", "", "two\nb", "c", " \n", "three\nC"]
    assert answer_numbers(texts, last_line) == [0, -1, 0, 1, -1, 1]
    assert answer_numbers([], last_line) == []
