"""Turns by separators, against splitting."""

import torch

from grade_lightning.functional.turns import turns_after


def test_turns_against_splitting() -> None:
    rows = ["ab.c..d", ".......", "abcdefg", "abcdef."]
    found = turns_after(torch.tensor([[letter == "." for letter in row] for row in rows]))
    for row, turns in zip(rows, found.tolist(), strict=True):
        parts = row.replace(".", ".|").split("|")
        assert turns == [i for i, part in enumerate(parts) for _ in part]
