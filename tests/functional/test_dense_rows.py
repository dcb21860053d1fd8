"""Dense rows against a plain loop over the sequences."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grade_lightning.functional.dense_rows import cheapest_rows, dense_rows

MASKS = st.lists(st.tuples(st.lists(st.booleans(), min_size=6, max_size=6), st.integers(0, 3)), min_size=1, max_size=7)


@settings(max_examples=60, deadline=None)
@given(MASKS)
def test_the_tokens_of_a_sequence_stand_in_a_row_and_no_other_between_them(
    drawn: list[tuple[list[bool], int]],
) -> None:
    mask, rows = torch.tensor([row for row, _ in drawn]), torch.tensor([row for _, row in drawn])
    packed = dense_rows(mask, rows)
    source, positions, n = packed.source.flatten(), packed.positions.flatten(), packed.source.shape[1]
    assert packed.tokens.tolist() == mask.flatten().nonzero().squeeze(1).tolist()
    read = dict(zip(packed.tokens.tolist(), packed.read.tolist(), strict=True))
    assert len(set(read.values())) == len(read)
    for i, (own, row) in enumerate(drawn):
        places = [read[i * 6 + j] for j in range(6) if own[j]]
        assert places == list(range(places[0], places[0] + len(places))) if places else True
        assert [int(source[place]) for place in places] == [i * 6 + j for j in range(6) if own[j]]
        assert [int(positions[place]) for place in places] == list(range(len(places)))
        assert {place // n for place in places} <= {row}
    padding = sorted(set(range(len(source))) - set(read.values()))
    assert all(place % n == 0 or positions[place] in (0, positions[place - 1] + 1) for place in padding)
    assert n == max(int(mask[rows == row].sum()) for row in range(int(rows.max()) + 1))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=30), st.integers(0, 100), st.integers(1, 600))
def test_rows_are_taken_where_they_cost_less(lengths: list[int], more: int, width: int) -> None:
    padded = max(lengths) + more
    rows = cheapest_rows(lengths, padded, width)

    def cost(count: int, n: int) -> int:
        return count * n * (3 * width + n)

    if rows is None:
        assert more == 0  # else each by itself, without the padding, would cost less
        return
    used = [sum(n for n, row in zip(lengths, rows, strict=True) if row == i) for i in range(max(rows) + 1)]
    assert all(used)
    assert cost(len(used), max(used)) < cost(len(lengths), padded)


def test_short_sequences_share_a_row_and_long_ones_have_their_own() -> None:
    assert cheapest_rows([64, 8, 8, 8, 8, 8, 8, 16], padded=64, width=256) == [0, 1, 1, 1, 1, 1, 1, 1]
    assert cheapest_rows([1000, 999], padded=1000, width=8) is None
    assert cheapest_rows([40, 30], padded=50, width=10**6) == [0, 0]  # pairs of positions cost next to nothing
    assert cheapest_rows([40, 30], padded=50, width=4) == [0, 1]


def test_attention_that_computes_a_sequences_own_pairs_has_one_row() -> None:
    assert cheapest_rows([1000, 999], padded=1000, width=8, square=False) == [0, 0]
    assert cheapest_rows([5, 5], padded=5, width=8, square=False) is None
