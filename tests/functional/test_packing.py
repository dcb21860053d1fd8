"""Packed rows against a plain loop over the sequences."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grade_lightning.functional.packing import block_causal, pack

SEQUENCES = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), min_size=1, max_size=9)


@settings(max_examples=60, deadline=None)
@given(SEQUENCES, st.integers(0, 2), st.integers(0, 2))
def test_each_token_sees_its_own_sequence_and_nothing_else(
    drawn: list[tuple[int, int]], more_prompt: int, more_text: int
) -> None:
    """What a position sees, in order, is the beginning of its sequence; what is read for a token ends before it."""
    labels, completions = (torch.tensor(x) for x in zip(*drawn, strict=True))
    prompts = labels + 1
    p, t = int(prompts.max()) + more_prompt, int(completions.max()) + more_text
    packed = pack(prompts, completions, labels, p, t)
    sees, source = block_causal(packed.segments).flatten(0, 1), packed.source.flatten()
    rows = packed.source.shape[1]
    assert len(packed.source) == len(set(labels.tolist()))
    leader = {label: labels.tolist().index(label) for label in labels.tolist()}
    used = set()
    for i, (label, length) in enumerate(drawn):
        own = [leader[label] * (p + t) + p - int(prompts[i]) + s for s in range(int(prompts[i]))]
        own += [i * (p + t) + p + s for s in range(length - 1)]
        for token in range(length):
            place = int(packed.read[i, token])
            first = place // rows * rows
            seen = source[first : first + rows][sees[place]].tolist()
            assert seen == own[: int(prompts[i]) + token]
            assert packed.positions.flatten()[place] == len(seen) - 1
            used.add(place)
        assert packed.read[i, length:].tolist() == [int(packed.read[i, length - 1])] * (t - length)
    real = (packed.segments >= 0).sum()
    assert real == sum(label + 1 for label in leader) + (completions - 1).sum()
    assert (packed.segments >= 0).any(0).all()  # no position is padding in every row


def test_every_position_sees_something() -> None:
    """Padding, too: a softmax over nothing is not a number."""
    packed = pack(torch.tensor([1, 2]), torch.tensor([2, 5]), torch.tensor([0, 1]), 2, 5)
    assert (packed.segments == -1).any()
    assert block_causal(packed.segments).any(-1).all()
