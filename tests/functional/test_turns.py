"""Turns: where they begin and end, against loops."""

import torch

from grade_lightning.functional.turns import at_turn_ends, turns_after


def test_turns_against_splitting() -> None:
    rows = ["ab.c..d", ".......", "abcdefg", "abcdef."]
    found = turns_after(torch.tensor([[letter == "." for letter in row] for row in rows]))
    for row, turns in zip(rows, found.tolist(), strict=True):
        parts = row.replace(".", ".|").split("|")
        assert turns == [i for i, part in enumerate(parts) for _ in part]


def test_what_a_turn_got_is_at_its_last_token() -> None:
    """Against a loop; some turns have no token of the mask, and get nothing."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(50, 9, generator=generator) < 0.6
    turns = (torch.rand(50, 9, generator=generator) < 0.3).long().cumsum(-1)
    values = torch.randn(50, 9, generator=generator)
    found = at_turn_ends(values, mask, turns)
    lost = 0
    for row in range(50):
        truth = torch.zeros(9)
        for turn in set(turns[row].tolist()):
            own = (mask[row] & (turns[row] == turn)).nonzero().flatten()
            lost += len(own) == 0
            if len(own):
                truth[own[-1]] = values[row, turn]
        assert torch.equal(found[row], truth)
    assert lost > 5
