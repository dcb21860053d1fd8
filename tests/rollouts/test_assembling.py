"""Answers of engines: what is made of them, and which are refused."""

import re

import pytest
import torch

from grade_lightning.errors import InputError
from grade_lightning.records import Prompts
from grade_lightning.rollouts import Distribution
from grade_lightning.rollouts.assembling import Answer, assembled
from tests.conftest import make_prompts
from tests.rollouts.rolling import logps_of, make_policy

ASKED = Distribution(max_new_tokens=4, min_new_tokens=1)
GOOD = [Answer([5, 6, 0], [-1.0, -2.0, -3.0]), Answer([5, 6, 7, 8], [-1.0] * 4), Answer([3, 0], [-0.5, 0.0])]


def test_answers_are_padded_on_the_right() -> None:
    rollout = assembled("Fake", make_policy(), ASKED, Prompts.of(make_prompts()), GOOD)
    assert rollout.completion_ids.tolist() == [[5, 6, 0, 1], [5, 6, 7, 8], [3, 0, 1, 1]]
    assert rollout.completion_mask.sum(-1).tolist() == [3, 4, 2]
    assert logps_of(rollout).tolist() == [[-1, -2, -3, 0], [-1] * 4, [-0.5, 0, 0, 0]]
    assert rollout.ended.tolist() == [True, False, True]
    assert rollout.completion_ids.dtype == torch.int64


@pytest.mark.parametrize(
    ("answers", "said"),
    {
        "one too few": (GOOD[:2], "2 completions for 3 prompts"),
        "none": ([Answer([], []), *GOOD[1:]], "completion 0 has 0 tokens"),
        "too long": ([GOOD[0], GOOD[1], Answer([5] * 5, [-1.0] * 5)], "completion 2 has 5 tokens instead of 1 to 4"),
        "too short": ([GOOD[0], Answer([5, 6], [-1.0] * 2), GOOD[2]], "completion 1 stops after 2 of 4 tokens"),
        "other vocabulary": ([Answer([99, 0], [-1.0] * 2), *GOOD[1:]], "completion 0 has token 99"),
        "past the end": ([Answer([0, 5, 5, 5], [-1.0] * 4), *GOOD[1:]], "completion 0 goes on after its end token (0)"),
        "ends early": ([Answer([0], [-1.0]), *GOOD[1:]], "completion 0 ends with 1 tokens, before min_new_tokens (1)"),
        "logps missing": ([Answer([5, 0], [-1.0]), *GOOD[1:]], "completion 0 has 2 tokens and 1 log-probabilities"),
        "not a number": ([Answer([5, 0], [-1.0, float("nan")]), *GOOD[1:]], "completion 0 has a log-probability"),
        "a probability": ([Answer([5, 0], [0.4, 0.2]), *GOOD[1:]], "completion 0 has a log-probability that is none"),
    }.values(),
    ids=str,
)
def test_other_answers_are_refused(answers: list[Answer], said: str) -> None:
    with pytest.raises(InputError, match=f"Fake: {re.escape(said)}.*resume") as caught:
        assembled("Fake", make_policy(), ASKED, Prompts.of(make_prompts()), answers)
    assert "\n" not in str(caught.value)
