"""Micro-batches by tokens against all ways to cut a few units."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from grade_lightning.functional.micro_batches import even_by_tokens

UNITS = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 30)), min_size=1, max_size=7)


@settings(max_examples=80, deadline=None)
@given(UNITS, st.integers(1, 7))
def test_no_other_cut_has_a_smaller_largest_part(units: list[tuple[int, int]], wanted: int) -> None:
    parts = min(wanted, len(units))
    sizes, tokens = [size for size, _ in units], [count for _, count in units]

    def largest(counts: list[int]) -> int:
        ends = [0, *itertools.accumulate(counts)]
        pieces = [slice(*pair) for pair in itertools.pairwise(ends)]
        return max(sum(sizes[piece]) * max(tokens[piece]) for piece in pieces)

    found = even_by_tokens(sizes, tokens, parts)
    cuts = itertools.combinations(range(1, len(units)), parts - 1)
    ways = [[b - a for a, b in itertools.pairwise((0, *cut, len(units)))] for cut in cuts]
    assert len(found) == parts
    assert min(found) > 0
    assert sum(found) == len(units)
    assert largest(found) == min(map(largest, ways))
