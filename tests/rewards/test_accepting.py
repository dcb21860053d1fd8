"""What is taken for a reward."""

from pathlib import Path
from typing import Any

import pytest

from grade_lightning.errors import InputError
from grade_lightning.methods import RLOO
from grade_lightning.rewards import ClassifierReward, FunctionReward, SequenceClassifierReward, WeightedSum, as_reward
from grade_lightning.rewards.classifier import HEAD_CONFIG


def brevity(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [-float(len(text)) for text in completions]


def test_what_is_a_reward(tmp_path: Path) -> None:
    own = ClassifierReward()
    assert as_reward(own) is own
    assert isinstance(as_reward("bundled"), ClassifierReward)
    assert isinstance(as_reward("name/on-the-hub"), SequenceClassifierReward)
    (tmp_path / HEAD_CONFIG).write_text("{}")
    assert isinstance(as_reward(tmp_path), ClassifierReward)
    both = as_reward([brevity, own])
    assert isinstance(both, WeightedSum)
    assert [part.name for part in both.parts] == ["brevity", own.name]
    module = RLOO(reward=brevity, judges=[brevity, "bundled"])
    assert isinstance(module.reward, FunctionReward)
    assert [type(judge) for judge in module.judges] == [FunctionReward, ClassifierReward]
    with pytest.raises(InputError, match="reward: int is not a reward; give a Reward, a function"):
        as_reward(3)  # type: ignore[arg-type]
