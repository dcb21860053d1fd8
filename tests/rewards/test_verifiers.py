"""Verifiers: right and wrong answers, and what is said of data and settings that cannot work."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from grade_lightning.errors import InputError
from grade_lightning.rewards.verifiers import (
    ExactMatch,
    FormatReward,
    JSONSchema,
    MathAnswer,
    NumericMatch,
    Verifier,
)
from tests.rewards.making import make_rollout


@pytest.mark.parametrize(
    ("verifier", "completion", "answer", "score"),
    [
        (FormatReward(r"\A<think>.*</think>\s*\S+\Z"), "<think>a\nb</think> 4", "", 1),
        (FormatReward(r"\A<think>.*</think>\s*\S+\Z"), "So <think>a</think> 4", "", 0),
        (FormatReward(r"\d"), "none", "", 0),
        (ExactMatch(), " Paris\n", "paris", 1),
        (ExactMatch(ignore_case=False), "Paris", "paris", 0),
        (ExactMatch(), "Paris, France", "Paris", 0),
        (ExactMatch(pattern=r"<a>(.*?)</a>"), "<a>no</a> rather <a> yes </a>", "yes", 1),
        (ExactMatch(pattern=r"<a>(.*?)</a>"), "yes", "yes", 0),
        (ExactMatch(pattern=r"yes|no"), "no, yes!", "yes", 1),
        (ExactMatch(), "7", 7, 1),
        (NumericMatch(), "It is 41 or 42.", "because\n#### 42", 1),
        (NumericMatch(), "It is 42 or 41.", 42, 0),
        (NumericMatch(), "$1,234.50", 1234.5, 1),
        (NumericMatch(), "−3", "-3", 1),
        (NumericMatch(), "1e3", 1000, 1),
        (NumericMatch(), "no number", 0, 0),
        (NumericMatch(), "", 0, 0),
        (NumericMatch(tolerance=0.1), "109", 100, 1),
        (NumericMatch(tolerance=0.1), "111", 100, 0),
        (NumericMatch(tolerance=0.1), "0.09", 0.0, 1),
        (NumericMatch(pattern=r"#### (\S+)"), "#### 4 and 5 more", 4, 1),
        (NumericMatch(pattern=r"#### (\S+)"), "4", 4, 0),
    ],
)
def test_a_score(verifier: Verifier, completion: str, answer: Any, score: float) -> None:
    assert verifier.check(completion, answer) == score


SCHEMA = {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}}


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ('{"name": "x"}', 1),
        ('Here:\n```json\n{"name": "x"}\n```\nDone.', 1),
        ('{"name": 1}', 0),
        ("{}", 0),
        ('{"name": "x"', 0),
        ("[" * 100_000, 0),
    ],
)
def test_json_of_a_schema(text: str, score: float, tmp_path: Path) -> None:
    pytest.importorskip("jsonschema")
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA))
    for schema in (SCHEMA, str(path)):
        assert JSONSchema(schema).check(text, "") == score
    assert JSONSchema().check("[1, 2]", "") == 1


def test_a_schema_that_is_none(tmp_path: Path) -> None:
    pytest.importorskip("jsonschema")
    with pytest.raises(InputError, match=r"^reward JSONSchema: this is not a JSON schema \(.*\)$"):
        JSONSchema({"type": "thing"})
    with pytest.raises(InputError, match="cannot be read as JSON"):
        JSONSchema(str(tmp_path / "none.json"))


@pytest.mark.parametrize(
    ("completion", "answer", "score"),
    [
        (r"So it is $\frac{1}{2}$.", "0.5", 1),
        (r"The answer is \boxed{2\sqrt{2}}", r"\sqrt{8}", 1),
        (r"The answer is $3$.", "4", 0),
        ("no idea", "4", 0),
        ("4", "", None),
    ],
)
def test_answers_of_mathematics(completion: str, answer: str, score: float | None) -> None:
    pytest.importorskip("math_verify")
    assert MathAnswer().check(completion, answer) == score


@pytest.mark.parametrize(("kind", "library"), [(JSONSchema, "jsonschema"), (MathAnswer, "math-verify")])
def test_a_library_that_is_missing_is_named(
    kind: type[Verifier], library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, library.replace("-", "_"), None)
    with pytest.raises(InputError, match=rf"needs {library}.*pip install 'grade-lightning\[verifiers\]'$"):
        kind()


def test_scores_of_a_rollout() -> None:
    """Completions are "w4 w5 w6 w7", "w8" and nothing; without a right answer it abstains."""
    rollout = make_rollout(solution=["w4 w5 w6 w7", "w9", None])
    found = ExactMatch(column="solution").score(rollout)
    assert found.parts.keys() == {"ExactMatch"}
    torch.testing.assert_close(found.total, torch.tensor([1.0, 0.0, torch.nan]), equal_nan=True)
    assert FormatReward(r"\Aw8\Z")(rollout).tolist() == [0, 1, 0]


def test_data_and_settings_that_cannot_work_are_one_line() -> None:
    with pytest.raises(InputError, match=r"no column 'answer' with the right answers; their columns are 'solution'"):
        ExactMatch()(make_rollout(solution=["a", "b", "c"]))
    with pytest.raises(InputError, match=r"column 'answer' holds 'two', which has no number"):
        NumericMatch().check("2", "two")
    for kind in (FormatReward, ExactMatch, NumericMatch):
        with pytest.raises(InputError, match=r"pattern '\(' is not a regular expression"):
            kind(pattern="(")
