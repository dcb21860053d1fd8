"""Masks, positions, truncation and counts, each against an independent implementation."""

import math

import pytest
import torch
from torch import Tensor
from transformers import TopKLogitsWarper, TopPLogitsWarper

from grade_lightning.functional.sequences import (
    completion_mask,
    distinct_bigrams,
    entropy,
    last_token,
    masked_sum,
    position_ids,
    token_logps,
    truncate_logits,
)


@pytest.mark.parametrize("top_k", [None, 1, 2, 7, 29, 30, 100])
@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 0.999, 1.0])
def test_truncation_equals_that_of_transformers(top_k: int | None, top_p: float) -> None:
    logits = 3 * torch.randn(200, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    truth = logits
    ids = torch.zeros(200, 1, dtype=torch.int64)
    if top_k is not None:
        truth = TopKLogitsWarper(top_k)(ids, truth)
    if top_p < 1:
        truth = TopPLogitsWarper(top_p)(ids, truth)
    found = truncate_logits(logits, top_k, top_p)
    assert torch.equal(found, truth)
    assert found.isfinite().any(-1).all()
    again = truncate_logits(logits.view(20, 10, 30), top_k, top_p)  # any batch shape
    assert torch.equal(again, truth.view(20, 10, 30))


def test_truncation_leaves_its_input_alone() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0]])
    truncate_logits(logits, top_k=1, top_p=0.5)
    assert torch.equal(logits, torch.tensor([[3.0, 2.0, 1.0]]))


def naive_mask(rows: list[list[int]], eos_ids: list[int]) -> list[list[bool]]:
    result = []
    for row in rows:
        ended, mask = False, []
        for token in row:
            mask.append(not ended)
            ended = ended or token in eos_ids
        result.append(mask)
    return result


@pytest.mark.parametrize("eos_ids", [[0], [0, 3], [], [9]])
def test_completion_mask_over_all_layouts(eos_ids: list[int]) -> None:
    """All 4⁴ rows over {0, 1, 2, 3}: first token, none, several, padding that is the end-of-sequence token itself."""
    tokens = torch.cartesian_prod(*[torch.arange(4)] * 4)
    assert completion_mask(tokens, eos_ids).tolist() == naive_mask(tokens.tolist(), eos_ids)


def test_position_ids_count_real_tokens() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    found = position_ids(mask)
    for row, keep in zip(found, mask.bool(), strict=True):
        assert row[keep].tolist() == list(range(int(keep.sum())))
    assert (found >= 0).all()


def naive_bigrams(rows: list[list[int]], lengths: list[int]) -> float:
    pairs = [(row[i], row[i + 1]) for row, n in zip(rows, lengths, strict=True) for i in range(n - 1)]
    return len(set(pairs)) / len(pairs)


def test_distinct_bigrams_equal_a_set_of_pairs() -> None:
    torch.manual_seed(0)
    for _ in range(20):
        tokens, lengths = torch.randint(4, (6, 8)), torch.randint(2, 9, (6,))
        mask = torch.arange(8) < lengths.unsqueeze(1)
        assert distinct_bigrams(tokens, mask) == naive_bigrams(tokens.tolist(), lengths.tolist())


@pytest.mark.parametrize("width", [1, 3])
def test_distinct_bigrams_without_any_is_nan(width: int) -> None:
    mask = torch.arange(width).expand(2, width) < 1
    assert math.isnan(distinct_bigrams(torch.zeros(2, width, dtype=torch.int64), mask))


def test_entropy_equals_torch_and_takes_masked_tokens() -> None:
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    truth = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(entropy(logits.log_softmax(-1)), truth)
    padded = torch.nn.functional.pad(logits, (0, 3), value=-torch.inf)
    torch.testing.assert_close(entropy(padded.log_softmax(-1)), truth)
    assert entropy(torch.tensor([0.0, -torch.inf])) == 0


def test_masked_sum_ignores_what_is_outside() -> None:
    values = torch.tensor([[1.0, torch.nan, torch.inf], [1.0, 2.0, 4.0]])
    mask = torch.tensor([[True, False, False], [True, True, False]])
    assert masked_sum(values, mask).tolist() == [1.0, 3.0]


def test_token_logps_pick_by_index() -> None:
    logps: Tensor = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[0, 4, 2], [1, 1, 3]])
    found = token_logps(logps, tokens)
    for b in range(2):
        for t in range(3):
            assert found[b, t] == logps[b, t, tokens[b, t]]


def test_the_last_token() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False], [True, True, True], [False, False, False]])
    assert last_token(mask).int().tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 1], [0, 0, 0]]


def test_the_last_token_of_all_masks_with_gaps() -> None:
    """All 2⁶ masks: where the last token of the sequence without its gaps came from; nowhere in an empty mask."""
    mask = torch.cartesian_prod(*[torch.tensor([False, True])] * 6)
    for row, found in zip(mask, last_token(mask), strict=True):
        positions = row.nonzero().squeeze(1)
        compressed = last_token(torch.ones(1, len(positions), dtype=torch.bool)).squeeze(0)
        truth = torch.zeros(6, dtype=torch.bool)
        truth[positions] = compressed
        assert torch.equal(found, truth)
        assert int(found.sum()) == bool(len(positions))
