"""Rollouts: what follows from their tensors; taking apart and joining."""

import io
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from grade_lightning.records import Rollout
from tests.conftest import make_tokenizer
from tests.rollouts.rolling import logps_of, make_policy, roll


def test_properties_of_a_rollout() -> None:
    rollout = Rollout(
        prompt_ids=torch.tensor([[1, 2], [3, 4]]),
        prompt_mask=torch.tensor([[0, 1], [1, 1]]),
        completion_ids=torch.tensor([[5, 0, 1], [6, 7, 8]]),
        completion_mask=torch.tensor([[True, True, False], [True, True, True]]),
        engine_logps=torch.zeros(2, 3),
        tokenizer=make_tokenizer(),
        eos_ids=[0],
    )
    assert rollout.ids.tolist() == [[1, 2, 5, 0, 1], [3, 4, 6, 7, 8]]
    assert rollout.mask.tolist() == [[0, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert rollout.lengths.tolist() == [2, 3]
    assert rollout.ended.tolist() == [True, False]
    assert rollout.prompts == ["w2", "w3 w4"]
    assert rollout.completions == ["w5", "w6 w7 w8"]


def made(tokens: list[list[int]], start: int = 0) -> Rollout:
    """Completions of these tokens, padded; prompts w2, w3 and so on after `start`."""
    width = max(map(len, tokens))
    mask = torch.arange(width) < torch.tensor([[len(row)] for row in tokens])
    ids = torch.tensor([row + [1] * (width - len(row)) for row in tokens])
    return Rollout(
        prompt_ids=torch.tensor([[1, 2 + start + i] for i in range(len(tokens))]),
        prompt_mask=torch.tensor([[0, 1]] * len(tokens)),
        completion_ids=ids,
        completion_mask=mask,
        engine_logps=-ids.float().masked_fill(~mask, 0),
        tokenizer=make_tokenizer(),
        columns={
            "label": [start + i for i in range(len(tokens))],
            "note": [f"n{start + i}" for i in range(len(tokens))],
        },
        eos_ids=[0],
    )


def test_a_part_of_a_rollout() -> None:
    """Rows in any order and more than once, with their texts and columns, and no longer than the longest of them."""
    whole = made([[5, 0], [6, 7, 8], [9]])
    assert whole.completions == ["w5", "w6 w7 w8", "w9"]
    part = whole.select(torch.tensor([2, 0, 2]))
    assert part.completion_ids.tolist() == [[9, 1], [5, 0], [9, 1]]
    assert part.ids.tolist() == [[4, 9, 1], [2, 5, 0], [4, 9, 1]]
    assert part.lengths.tolist() == [1, 2, 1]
    assert part.ended.tolist() == [False, True, False]
    assert logps_of(part).tolist() == [[-9, 0], [-5, 0], [-9, 0]]
    assert part.prompts == ["w4", "w2", "w4"]
    assert part.completions == ["w9", "w5", "w9"]
    assert part.columns == {"label": [2, 0, 2], "note": ["n2", "n0", "n2"]}
    assert part.eos_ids == [0]
    assert whole.columns["label"] == [0, 1, 2]


def test_rollouts_of_other_lengths_are_joined() -> None:
    """The shorter ones are padded: with the padding token, outside of the mask, and with log-probability 0."""
    parts = [made([[5, 0], [6]]), made([[7, 8, 9]], start=2), made([[0]], start=3)]
    assert parts[0].completions == ["w5", "w6"]
    whole = Rollout.join(parts)
    assert whole.completion_ids.tolist() == [[5, 0, 1], [6, 1, 1], [7, 8, 9], [0, 1, 1]]
    assert whole.completion_mask.int().tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 0, 0]]
    assert whole.completion_mask.dtype == torch.bool
    assert whole.mask.tolist()[3] == [0, 1, 1, 0, 0]
    assert logps_of(whole).tolist() == [[-5, 0, 0], [-6, 0, 0], [-7, -8, -9], [0, 0, 0]]
    assert whole.prompts == ["w2", "w3", "w4", "w5"]
    assert whole.completions == ["w5", "w6", "w7 w8 w9", ""]
    assert whole.columns == {"label": [0, 1, 2, 3], "note": ["n0", "n1", "n2", "n3"]}
    assert whole.ended.tolist() == [True, False, False, True]


def test_joining_undoes_taking_apart() -> None:
    whole = roll(make_policy())
    parts = [whole.select(rows) for rows in torch.arange(len(whole.ids)).chunk(4)]
    again = Rollout.join(parts)
    for name in ("ids", "mask", "engine_logps", "completion_ids", "completion_mask", "prompt_ids", "prompt_mask"):
        assert torch.equal(getattr(again, name), getattr(whole, name))
    assert again.completions == whole.completions


def with_turns() -> Rollout:
    """Two completions of one prompt and one of another; the second turn of the first begins with somebody's answer."""
    whole = made([[5, 9, 6, 0], [6, 7], [8]])
    sampled = whole.completion_mask.clone()
    sampled[0, 1] = False
    turns = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]])
    return replace(whole, sampled=sampled, turns=turns, groups=torch.tensor([3, 3, 1]))


def test_everything_but_an_answer_is_sampled_and_no_completion_has_a_fellow_by_default() -> None:
    whole = made([[5, 0], [6, 7, 8]])
    assert torch.equal(whole.sampled, whole.completion_mask)
    assert whole.groups.tolist() == [0, 1]
    assert whole.turns is None


def test_only_sampled_tokens_are_taken_and_put_back() -> None:
    rollout = with_turns()
    assert rollout.positions.tolist() == [0, 2, 3, 4, 5, 8]
    assert rollout.tokens.tolist() == [5, 6, 0, 6, 7, 8]
    values = torch.arange(1.0, 25.0).view(3, 4, 2)
    assert torch.equal(rollout.put(rollout.take(values)), values * rollout.sampled.unsqueeze(-1))
    assert rollout.lengths.tolist() == [4, 2, 1]
    assert rollout.completions == ["w5 w9 w6", "w6 w7", "w8"]


def test_turns_answers_and_groups_are_selected_joined_and_packed() -> None:
    rollout = with_turns()
    part = rollout.select(torch.tensor([2, 1]))
    assert part.groups.tolist() == [1, 3]
    assert part.turns is not None
    assert part.turns.tolist() == [[0, 0], [0, 0]]
    assert part.sampled.tolist() == [[True, False], [True, True]]
    whole = Rollout.join([part, rollout])
    assert whole.turns is not None
    assert whole.turns.tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert whole.sampled[2].tolist() == [True, False, True, True]
    assert whole.layout.row.tolist() == [0, 1, 3, 3, 2]  # prompts of one are none of the other's
    again = Rollout.unpack(whole.pack(), whole.tokenizer)
    for name, value in vars(whole).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(again, name), value), name
    assert again.eos_ids == whole.eos_ids
    assert again.columns == whole.columns
    assert all(isinstance(value, (torch.Tensor, list, dict)) for value in whole.pack().values())


def test_columns_of_plain_values_are_packed_and_no_others() -> None:
    plain: dict[str, list[Any]] = {"a": [1, 2.0], "b": [None, True], "c": [["x"], {"y": [{"z": 1}]}]}
    other: dict[str, list[Any]] = {"d": [1, np.float64(2)], "e": [{"y": np.int64(1)}, {}], "f": [[object()], []]}
    whole = replace(made([[5, 0], [6]]), columns=plain | other)
    file = io.BytesIO()
    torch.save(whole.pack(), file)
    file.seek(0)
    assert Rollout.unpack(torch.load(file, weights_only=True), whole.tokenizer).columns == plain


def test_completions_of_the_data_have_no_engine_logps() -> None:
    given = replace(made([[5, 0], [6, 7, 8]]), engine_logps=None)
    rows = torch.tensor([1, 0])
    for rollout in (given.select(rows), Rollout.join([given, given]), Rollout.unpack(given.pack(), given.tokenizer)):
        assert rollout.engine_logps is None
