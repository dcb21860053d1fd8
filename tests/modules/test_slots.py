"""Tokens in their place, and without them."""

import pytest
import torch

from grade_lightning.errors import InputError
from grade_lightning.modules.slots import columns_of, exchanged, fill, without
from grade_lightning.records import Prompts, Rollout
from tests.conftest import make_tokenizer

TOKENS = [16, 17]
PAD, BOS = 1, 0


def prompts(*rows: list[int]) -> Prompts:
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return Prompts(ids, mask, {"label": list(range(len(rows)))})


def rollout_of(given: Prompts) -> Rollout:
    ids = torch.full((len(given), 1), 5)
    return Rollout(given.ids, given.mask, ids, ids > 0, None, make_tokenizer(), given.columns, [BOS])


@pytest.mark.parametrize(
    ("slot", "rows", "filled", "bare"),
    [
        (None, [[3, 4], [5]], [[16, 17, 3, 4], [16, 17, 5]], [[3, 4], [5]]),
        (None, [[BOS, 3, 4], [BOS, 5]], [[BOS, 16, 17, 3, 4], [BOS, 16, 17, 5]], [[BOS, 3, 4], [BOS, 5]]),
        ("w9", [[3, 9, 4], [9, 6, 7]], [[3, 16, 17, 4], [16, 17, 6, 7]], [[3, 4], [6, 7]]),
        ("w9", [[3, 4, 9], [6, 9]], [[3, 4, 16, 17], [6, 16, 17]], [[3, 4], [6]]),
    ],
)
def test_they_come_first_or_where_the_slot_is(
    slot: str | None, rows: list[list[int]], filled: list[list[int]], bare: list[list[int]]
) -> None:
    found = fill(prompts(*rows), TOKENS, make_tokenizer(), slot)
    expected = prompts(*filled)
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.mask, expected.mask)
    assert found.columns["label"] == [0, 1]
    rollout = rollout_of(found)
    assert rollout.prompt_ids.gather(1, columns_of(rollout, 2)).tolist() == [TOKENS] * 2
    other = exchanged(rollout, [8, 2])
    assert torch.equal(other.ids, fill(prompts(*rows), [8, 2], make_tokenizer(), slot).ids)
    judged = without(rollout, 2)
    assert judged.columns == {"label": [0, 1]}
    assert [row[keep].tolist() for row, keep in zip(judged.prompt_ids, judged.prompt_mask.bool(), strict=True)] == bare
    assert torch.equal(judged.completion_ids, rollout.completion_ids)


def test_a_prompt_without_the_slot_is_named() -> None:
    with pytest.raises(InputError, match=r"slot 'w9': not in the prompt 'w5'; every prompt of the data needs it"):
        fill(prompts([3, 9], [5]), TOKENS, make_tokenizer(), "w9")
