"""Agentic AEPO: its advantages by hand, its gate, and its base without them."""

import math
from typing import Any

import pytest
import torch

from grade_lightning.functional.advantages import group_standardised
from grade_lightning.methods import DAPO, GPPO, AgenticAEPO
from tests.modules.toys import build, plain, prompts, run

pytestmark = pytest.mark.usefixtures("own_random_state")


@pytest.mark.parametrize("steps", [{"epochs": 3}, {"minibatches": 2}], ids=str)
def test_without_entropy_it_is_gppo_without_its_lower_scale_bit_for_bit(steps: dict[str, Any]) -> None:
    one = run(build(AgenticAEPO, **plain(AgenticAEPO, entropy_scale=0.0, **steps)), prompts(4))
    base = plain(GPPO, epsilon_high=0.2, low_scale=0.0, dual=math.inf, **steps)
    two = run(build(GPPO, **base), prompts(4))
    for ours, truth in zip(one.gradients, two.gradients, strict=True):
        assert all(torch.equal(ours[name], truth[name]) for name in truth)


def test_with_one_step_that_is_grpo_with_a_mean_over_tokens() -> None:
    one = run(build(AgenticAEPO, **plain(AgenticAEPO, entropy_scale=0.0)), prompts(4))
    two = run(build(DAPO, **plain(DAPO, overlong_buffer=0)), prompts(4))
    assert all(torch.equal(one.gradients[0][name], two.gradients[0][name]) for name in two.gradients[0])


def test_advantages_by_hand() -> None:
    seen = build(AgenticAEPO, **plain(AgenticAEPO, entropy_scale=0.3, epochs=2)).collect(prompts(4))
    entropies = seen.old.entropy[seen.mask].double()
    z = (seen.old.entropy - entropies.mean()) / entropies.std()
    bare = group_standardised(seen.scores.total.unflatten(0, (-1, 4))).flatten().unsqueeze(1)
    truth = (bare * (1 + 0.3 * z).clamp(min=0)) * seen.mask
    torch.testing.assert_close(seen.advantages, truth, rtol=1e-3, atol=1e-4)
    assert ((truth / bare)[seen.mask].std()) > 0.05


def test_the_gate() -> None:
    """(1.5, A > 0): 1.2; (0.5, A < 0): 0; and where A pushes back, the ratio."""
    module = build(AgenticAEPO)
    seen = build(AgenticAEPO, **plain(AgenticAEPO, epochs=2)).collect(prompts(1))
    gate = module.terms[0].gate  # type: ignore[attr-defined]
    seen.advantages = torch.tensor([[1.0, -1.0, -1.0, 1.0]])
    found = gate(torch.tensor([[1.5, 0.5, 1.5, 0.5]]), seen)
    torch.testing.assert_close(found, torch.tensor([[1.2, 0.0, 1.5, 0.5]]))
