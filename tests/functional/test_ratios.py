"""Ratios of tokens, turns and sequences against loops."""

import pytest
import torch

from grade_lightning.functional.ratios import importance_ratio, sequence_level, turn_level
from tests.functional.batches import SEGMENTS, level_of, make_batch, naive_ratio
from tests.functional.problems import equal


@pytest.mark.parametrize("level", SEGMENTS)
def test_the_ratio_is_a_geometric_mean(level: str) -> None:
    batch = make_batch(3)
    ratio = importance_ratio(batch.logps, batch.old_logps, batch.mask, level_of(level, batch))
    truth = naive_ratio(batch, SEGMENTS[level](batch)).detach()
    equal(ratio[batch.mask], truth[batch.mask], 1e-14)
    assert not ratio.requires_grad
    dirty = batch.logps.detach().masked_fill(~batch.mask, torch.nan)
    assert torch.equal(importance_ratio(dirty, batch.old_logps, batch.mask, level_of(level, batch)), ratio)


def test_one_turn_is_a_sequence_and_turns_of_one_token_are_tokens() -> None:
    batch = make_batch(4)
    values = batch.logps.detach()
    whole = turn_level(values, batch.mask, torch.zeros_like(batch.turns))
    equal(whole, sequence_level(values, batch.mask), 1e-15)
    each = turn_level(values, batch.mask, torch.arange(12).expand(6, 12).contiguous())
    assert torch.equal(each[batch.mask], values[batch.mask])
