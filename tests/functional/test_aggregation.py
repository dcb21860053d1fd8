"""Aggregations against loops, and over steps that are split."""

import itertools

import pytest
import torch

from grade_lightning.functional.aggregation import Normalizers, constant, sequence_mean, sequence_sum, token_mean
from grade_lightning.functional.ratios import token_level
from tests.functional.batches import AGGREGATIONS, GATES, Batch, gradient, loss_line, make_batch, totals_of
from tests.functional.problems import equal


def test_aggregations_against_loops() -> None:
    """And each makes a mean, or a sum, of a constant loss what its name says."""
    mask = make_batch(5).mask
    mask[2] = False  # a completion with no token counts as a sequence, and divides by nothing
    totals = Normalizers(tokens=64, sequences=8)  # powers of two: float32 has them exactly
    lengths = [int(row.sum()) for row in mask]
    for b, t in itertools.product(range(6), range(12)):
        inside = float(mask[b, t])
        assert token_mean(mask, totals)[b, t] == inside / 64
        assert sequence_sum(mask, totals)[b, t] == inside / 8
        assert constant(mask, totals, length=16)[b, t] == inside / 8 / 16
        assert sequence_mean(mask, totals)[b, t] == pytest.approx(inside / max(lengths[b], 1) / 8, rel=1e-6)
    own = Normalizers(tokens=sum(lengths), sequences=6)
    assert float(token_mean(mask, own).sum()) == pytest.approx(1)
    assert float(sequence_mean(mask, own).sum()) == pytest.approx(5 / 6)
    assert float(sequence_sum(mask, own).sum()) == pytest.approx(sum(lengths) / 6)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_gradient_does_not_depend_on_how_a_step_is_split(aggregation: str) -> None:
    """Three micro-batches, or processes, of two rows each, averaged: their totals are a third of all counts."""
    batch = make_batch(6)
    aggregate = AGGREGATIONS[aggregation]
    whole = totals_of(batch.mask)
    truth = gradient(batch, loss_line(batch, aggregate(batch.mask, whole), GATES["clipped"], token_level))
    found = torch.zeros_like(truth)
    for rows in (slice(0, 2), slice(2, 4), slice(4, 6)):
        part = Batch(*(x[rows] for x in batch))
        weights = aggregate(part.mask, Normalizers(whole.tokens / 3, whole.sequences / 3))
        found += gradient(batch, loss_line(part, weights, GATES["clipped"], token_level)) / 3
    equal(found, truth, 1e-7)  # weights are float32
    assert len(set(batch.mask.sum(-1).tolist())) > 1
