"""Predictions in a file of JSON lines."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from grade_lightning.callbacks import PredictionWriter
from grade_lightning.errors import InputError
from tests.callbacks.runs import judged_by, ones, rows, trainer


def test_predictions_have_their_name_only_when_they_are_complete(tmp_path: Path) -> None:
    calls = []

    def fails_later(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        calls.append(sorted(path.name for path in tmp_path.iterdir()))
        if len(calls) == 2:
            raise OSError("disk full")
        return [1.0 for _ in completions]

    path = tmp_path / "a.jsonl"
    with pytest.raises(InputError, match="disk full"):
        trainer(tmp_path, PredictionWriter(str(path))).predict(judged_by(fails_later), rows(), return_predictions=False)
    assert calls == [["a.jsonl.part"]] * 2
    assert not list(tmp_path.iterdir())

    trainer(tmp_path, PredictionWriter(str(path))).predict(judged_by(ones), rows(), return_predictions=False)
    assert [item.name for item in tmp_path.iterdir()] == ["a.jsonl"]  # what was left is not in it
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(found) == 6
    assert {row["reward"] for row in found} == {1.0}


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_predictions_that_are_no_number_are_valid_json(value: float | None, tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.jsonl"
    policy = judged_by(lambda completions, **columns: [value] * len(completions))
    trainer(tmp_path, PredictionWriter(str(path))).predict(policy, rows(1), return_predictions=False)
    lines = path.read_text().splitlines()
    assert lines
    assert [json.loads(line)["reward"] for line in lines] == [None] * len(lines)


def test_predictions_are_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("kept")
    with pytest.raises(InputError, match=r"a\.jsonl: exists already; give --output another name"):
        trainer(tmp_path, PredictionWriter(str(path))).predict(judged_by(ones), rows(), return_predictions=False)
    assert path.read_text() == "kept"
    assert [item.name for item in tmp_path.iterdir()] == ["a.jsonl"]
