"""GPPO with ratios that are centred before the gate looks at them (experimental)."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from grade_lightning.functional.gates import clipped
from grade_lightning.gates import by_advantage, standardised
from grade_lightning.methods import GPPO
from tests.modules.toys import build, plain, prompts, run

pytestmark = pytest.mark.usefixtures("own_random_state")


@pytest.mark.parametrize("ratios", ["centred", "standardised"])
def test_the_first_step_is_the_plain_one_bit_for_bit(ratios: str) -> None:
    """The second is not: there the bounds of the two differ."""
    one, two = (
        run(build(GPPO, **plain(GPPO, epochs=2, epsilon_low=0.05, epsilon_high=0.05, ratios=x), lr=0.3), prompts(4))
        for x in (ratios, "plain")
    )
    first, second = (
        all(torch.equal(ours[name], truth[name]) for name in truth)
        for ours, truth in zip(one.gradients, two.gradients, strict=True)
    )
    assert first
    assert not second


def test_the_gate_decides_by_the_centred_ratio_and_keeps_the_ratio_itself() -> None:
    """A drift that all tokens share cuts off nothing; a token that goes against it is cut off."""
    module = build(GPPO, **plain(GPPO, epochs=2))
    seen: Any = module.collect(prompts(4))
    up = replace(seen, advantages=torch.ones_like(seen.advantages))
    gate = by_advantage(clipped, low=0.8, high=1.2)
    drift = torch.full_like(seen.advantages, 1.5)
    assert not gate(drift, up)[seen.sampled].any()
    assert torch.equal(standardised(gate)(drift, up), drift)
    odd = drift.clone()
    odd[-1, 0] = 9.0
    found = standardised(gate)(odd, up)
    assert found[-1, 0] == 0
    assert (found[seen.sampled] == 1.5).sum() == seen.sampled.sum() - 1
