"""AEPO: its controller, its base without it, and both of its modes by hand."""

import math
from typing import Any

import pytest
import torch

from grade_lightning.methods import AEPO, DAPO
from grade_lightning.rollouts import Sampler, TransformersEngine
from tests.modules.toys import build, plain, prompts, run, states

pytestmark = pytest.mark.usefixtures("own_random_state")


@pytest.mark.parametrize("steps", [{}, {"epochs": 2}, {"minibatches": 2}], ids=str)
@pytest.mark.parametrize("off", [{"mode": "rollout", "weight": 0.0}, {"mode": "reweight", "most": 0.0}], ids=str)
def test_switched_off_it_is_grpo_bit_for_bit(off: dict[str, Any], steps: dict[str, Any]) -> None:
    """With a mean over tokens, which is DAPO without its own features."""
    one = run(build(AEPO, **plain(AEPO, **off, **steps)), prompts(4))
    two = run(build(DAPO, **plain(DAPO, epsilon_high=0.2, overlong_buffer=0, **steps)), prompts(4))
    for ours, truth in zip(one.gradients, two.gradients, strict=True):
        assert all(torch.equal(ours[name], truth[name]) for name in truth)


def test_reweighting_at_the_target_and_at_temperature_one_is_grpo() -> None:
    module = build(AEPO, **plain(AEPO, mode="reweight", epochs=2, temperature_high=1.0, temperature_low=1.0))
    assert isinstance(module, AEPO)
    module.control.entropy = module.control.target
    bare = build(DAPO, **plain(DAPO, epsilon_high=0.2, overlong_buffer=0, epochs=2))
    assert torch.equal(module.collect(prompts(4)).advantages, bare.collect(prompts(4)).advantages)


@pytest.mark.parametrize(("entropy", "temperature"), [(0.0, 1.2), (0.5, 1.2), (0.51, 0.8), (3.0, 0.8)])
def test_the_controller(entropy: float, temperature: float) -> None:
    control = AEPO().control
    control.load_state_dict({"entropy": entropy})
    assert control.temperature == temperature


def test_reweighted_advantages_by_hand() -> None:
    settings = plain(AEPO, epochs=2, correct=0.45)
    module = build(AEPO, **settings, mode="reweight")
    seen = module.collect(prompts(4))
    bare = build(AEPO, **settings, mode="reweight", most=0.0).collect(prompts(4))
    with torch.no_grad():
        rollout = seen.rollout
        length = rollout.completion_ids.shape[1]
        logits = module.policy(module.policy.embed(rollout.ids[:, :-1]), rollout.mask[:, :-1], length).double()
    index = rollout.completion_ids.unsqueeze(-1)
    ratio = ((logits / 1.2).softmax(-1) / logits.softmax(-1)).gather(-1, index).squeeze(-1)
    right = seen.scores.total >= 0.45
    assert 0 < right.sum() < len(right)
    alpha = 0.1 / float(right.double().mean())
    alpha = alpha / (1 + alpha)
    truth = ((1 - alpha) * bare.advantages + alpha * right.unsqueeze(1) * ratio) * seen.mask
    torch.testing.assert_close(seen.advantages, truth, rtol=1e-5, atol=1e-6)


def test_rows_of_another_temperature_are_reinforced_by_their_reward() -> None:
    module = build(AEPO, **plain(AEPO, epochs=2, weight=0.7))
    seen = module.collect(prompts(8))
    assert seen.extra["tempered"].tolist() == [0.0] * 32 + [1.0] * 8
    expected = 0.7 * seen.scores.total[32:].unsqueeze(1) * seen.mask[32:]
    torch.testing.assert_close(seen.advantages[32:].double(), expected.double())
    bare = build(AEPO, **plain(AEPO, epochs=2, weight=0.0)).collect(prompts(8))
    assert torch.equal(seen.advantages[:32], bare.advantages)
    gate = module.terms[0].gate  # type: ignore[attr-defined]
    found = gate(torch.full(seen.mask.shape, 9.0), seen)
    assert (found[32:] == 1).all()
    assert set(found[:32][seen.mask[:32]].tolist()) == {0.0, 9.0}


def test_it_draws_at_that_temperature() -> None:
    """As told to the engine; the log-probabilities are the policy's own."""
    temperatures: list[float] = []

    class Told(TransformersEngine):
        def generate(self, policy: Any, distribution: Any, prompts: Any) -> Any:
            temperatures.append(distribution.temperature)
            return super().generate(policy, distribution, prompts)

    module = build(AEPO, **plain(AEPO, sampler=Sampler(6, temperature=0.5, engine=Told())))
    run(module, prompts(4), prompts(4))
    assert temperatures[:2] == [0.5, 0.6]
    assert states(module)["control"]["entropy"] > 0
    assert math.isfinite(states(module)["control"]["entropy"])


def test_a_stop_string_ends_those_too() -> None:
    module = build(AEPO, **plain(AEPO, sampler=Sampler(12, stop="w7")))
    rollout = module.collect(prompts(16)).rollout
    last = torch.tensor(rollout.tokenizer.convert_tokens_to_ids("w7"))
    said = rollout.completion_ids.masked_fill(~rollout.sampled, -1)[64:]
    stops = said == last
    assert stops.any(1).sum() > 1
    for row, place in zip(*stops.nonzero(as_tuple=True), strict=True):
        assert (said[row, place + 1 :] == -1).all()
