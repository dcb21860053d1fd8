"""Tools: what is calculated and found, and what is refused."""

from pathlib import Path

import pytest

from grade_lightning.errors import InputError
from grade_lightning.rollouts import Calculator, Search
from grade_lightning.rollouts.tools import calculated


@pytest.mark.parametrize(
    ("term", "value"),
    [
        ("2+3*4", "14"),
        ("(2+3)*4", "20"),
        ("-7 // 2", "-4"),
        ("10 % 4", "2"),
        ("1,234.5 × 2", "2469"),
        ("9 ÷ 4", "2.25"),
        ("1/3", "0.3333333333"),
        ("1e308*10", "inf"),
        ("5 / (3 - 3)", "error: division by zero"),
        ("2 ** 99999999", "error: not a term"),
        ("__import__('os').getcwd()", "error: not a term"),
        ("True + 1", "error: not a term"),
        ("x + 1", "error: not a term"),
        ("", "error: not a term"),
        ("(" * 500 + "1" + ")" * 500, "error: not a term"),
    ],
)
def test_terms(term: str, value: str) -> None:
    assert calculated(term) == value


def test_a_calculator_answers_so_many_terms_and_the_last_of_a_turn() -> None:
    tool = Calculator(calls=2)
    for _ in range(2):  # begun anew for each episode
        assert tool.reset({}) == []
        answer, reward, over = tool.step("<calc>1+1</calc> or <calc>2\n+2</calc>")
        assert (answer, reward, over) == ([{"role": "tool", "content": " = 4\n"}], None, False)
        assert tool.step("<calc>3*3</calc>")[2] is False
        assert tool.step("<calc>4</calc>") == ([], None, True)


def test_a_search_finds_the_paragraph_that_shares_most_words(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The capital of France is Paris.\n\nThe capital of Peru is Lima.\n")
    (tmp_path / "b.txt").write_text("Lima beans are green.")
    tool = Search(str(tmp_path), answer="[{text}]")
    tool.reset({})
    assert tool.step("<search>capital Peru</search>")[0][0]["content"] == "[The capital of Peru is Lima.]"
    assert tool.step("<search>green beans?</search>")[0][0]["content"] == "[Lima beans are green.]"
    assert tool.step("<search>Quito</search>")[0][0]["content"] == "[nothing found]"
    assert tool.step("It is Lima.") == ([], None, True)


def test_wrong_settings(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"Calculator\.pattern: '\(' is not a regular expression"):
        Calculator("(")
    with pytest.raises(InputError, match="has 0 groups; put one around what is asked"):
        Calculator("<calc>")
    with pytest.raises(InputError, match=r"no text in \*\.txt files"):
        Search(str(tmp_path))
    with pytest.raises(InputError, match="calls"):
        Calculator(calls=0)
