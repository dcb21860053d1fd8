"""Penalties against the formulas of their papers."""

import torch

from grade_lightning.functional.penalties import overlong_penalty


def test_overlong_penalty_is_dapo_s() -> None:
    """0, then ((L_max − L_c) − L) / L_c in the buffer, then −1; L_max = 20 and L_c = 4."""
    for length in range(1, 26):
        truth = 0.0 if length <= 16 else (16 - length) / 4 if length <= 20 else -1.0
        found = overlong_penalty(torch.tensor([length]), longest=20, buffer=4)
        assert found.tolist() == [truth]
