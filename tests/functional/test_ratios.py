"""Ratios of tokens, turns and sequences against loops."""

import pytest
import torch

from grade_lightning.functional.ratios import importance_ratio, sequence_level, standardised_ratio, turn_level
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


@pytest.mark.parametrize("spread", [None, 0.1, 50.0])
def test_standardised_ratios_by_hand(spread: float | None) -> None:
    """The mean of their logarithms is 0, and their deviation the spread; one that is smaller stays as it is."""
    batch = make_batch(5)
    ratio = (batch.logps - batch.old_logps).detach().exp()
    found = standardised_ratio(ratio.masked_fill(~batch.mask, torch.nan), batch.mask, spread)
    logs = ratio.log()[batch.mask]
    scale = 1.0 if spread is None else min(1.0, spread / float(logs.std()))
    equal(found[batch.mask].log(), scale * (logs - logs.mean()), 1e-12)
    assert (found[~batch.mask] == 1).all()


def test_ratios_of_one_stay_one() -> None:
    """Also in float32, whatever the spread."""
    ones, mask = torch.ones(3, 4), torch.ones(3, 4, dtype=torch.bool)
    for spread in (None, 1e-8, 0.1):
        assert torch.equal(standardised_ratio(ones, mask, spread), ones)


def test_standardised_ratios_are_those_of_all_processes() -> None:
    batch, sent = make_batch(6), []
    ratio = (batch.logps - batch.old_logps).detach().exp()
    whole = standardised_ratio(ratio, batch.mask, 0.1)
    halves = slice(0, 3), slice(3, 6)
    for rows in halves:
        standardised_ratio(ratio[rows], batch.mask[rows], 0.1, lambda x: (sent.append(x), x)[1])  # type: ignore[func-returns-value]
    total = sum(sent, torch.zeros(()))
    parts = [standardised_ratio(ratio[rows], batch.mask[rows], 0.1, lambda _: total) for rows in halves]
    equal(torch.cat(parts), whole, 1e-12)
