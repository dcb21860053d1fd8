"""CPL: what its score is a sum of, what it is without its own options, and what is cloned."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from grade_lightning.methods import CPL, DPO
from grade_lightning.modules.preference import Side
from grade_lightning.records import TokenStats

PLAIN: dict[str, Any] = {"score": "sum", "contrastive_bias": 1.0, "bc_coeff": 0.0}


def side(*rows: list[float], reference: float = -3.0) -> Side:
    """Log π of each token, and a reference that gives all the same."""
    longest = max(map(len, rows))
    mask = torch.tensor([[i < len(row) for i in range(longest)] for row in rows])
    logps = torch.tensor([[*row, *[0.0] * (longest - len(row))] for row in rows])
    ratio, ref = (logps - reference).masked_fill(~mask, 0), torch.full_like(logps, reference).masked_fill(~mask, 0)
    zero = torch.zeros_like(logps)
    return TokenStats(logps, ratio, zero, zero, ref), mask


CHOSEN, REJECTED = side([-0.4, -0.6], [-2.0]), side([-0.5, -0.5, -1.0], [-1.0])


def test_without_bias_and_with_a_reference_it_is_dpo() -> None:
    ours = CPL(alpha=0.3, reference_free=False, **PLAIN).pair_loss(CHOSEN, REJECTED)
    torch.testing.assert_close(ours, DPO(beta=0.3).pair_loss(CHOSEN, REJECTED))


def test_without_a_reference_the_score_is_of_the_policy_alone() -> None:
    """S_w = −1, S_l = −2 and S_w = −2, S_l = −1; at half the rejected score the first is even."""
    loss = CPL(**PLAIN).pair_loss(CHOSEN, REJECTED)
    assert loss.tolist() == pytest.approx([math.log1p(math.exp(-1)), math.log1p(math.exp(1))])
    assert CPL(**PLAIN | {"contrastive_bias": 0.5}).pair_loss(CHOSEN, REJECTED)[0].item() == pytest.approx(math.log(2))


def test_a_mean_knows_no_length() -> None:
    """−1/2 against −2/3, by their own numbers of tokens."""
    loss = CPL(**PLAIN | {"score": "mean"}).pair_loss(CHOSEN, REJECTED)
    assert loss[0].item() == pytest.approx(math.log1p(math.exp(-1 / 6)))


@pytest.mark.parametrize(("on", "cloned"), [("chosen", [0.5, 2.0]), ("both", [(0.5 + 2 / 3) / 2, 1.5])])
def test_cloning_is_of_tokens(on: Any, cloned: list[float]) -> None:
    plain, more = (CPL(**PLAIN | {"bc_coeff": weight}, bc_on=on).pair_loss(CHOSEN, REJECTED) for weight in (0.0, 0.2))
    difference: Tensor = (more - plain) / 0.2
    assert difference.tolist() == pytest.approx(cloned)
