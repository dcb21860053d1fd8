"""The correction of an engine that is somewhat off, in a run."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from grade_lightning.corrections import EngineCorrection
from grade_lightning.errors import InputError
from grade_lightning.functional.corrections import truncated_importance
from grade_lightning.kl import KL
from grade_lightning.methods import GRPO, RLOO
from grade_lightning.policies import Policy
from grade_lightning.records import Prompts, Rollout
from grade_lightning.rollouts import Distribution, Sampler
from tests.modules.toys import Prescribed, build, distance, gradient, plain, prompts, run

pytestmark = pytest.mark.usefixtures("own_random_state")


class Rounded(Prescribed):
    """Draws from log-probabilities that are off by up to half of a nat."""

    def generate(self, policy: Policy, distribution: Distribution, prompts: Prompts) -> Rollout:
        found = super().generate(policy, distribution, prompts)
        assert found.engine_logps is not None
        noise = torch.linspace(-0.5, 0.5, found.engine_logps.numel()).view_as(found.engine_logps)
        return replace(found, engine_logps=found.engine_logps + noise)


class Mute(Prescribed):
    def generate(self, *args: Any) -> Rollout:
        return replace(super().generate(*args), engine_logps=None)


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_advantages_have_the_weights(level: Any, epochs: int) -> None:
    settings = plain(RLOO, kl=KL(), epochs=2, sampler=Sampler(12, engine=Rounded()))
    bare = build(RLOO, **settings).collect(prompts(4))
    module = build(RLOO, **settings, correction=EngineCorrection(1.1, level))
    seen = module.collect(prompts(4))
    engine = seen.rollout.engine_logps
    assert engine is not None
    weights = truncated_importance(seen.old.logps, engine, seen.mask, 1.1, level)
    assert ((weights != 1) & seen.mask).sum() > 0
    torch.testing.assert_close(seen.advantages, bare.advantages * weights)


def test_an_engine_that_is_right_changes_nothing() -> None:
    batch = prompts(4)
    settings = plain(GRPO, sampler=Sampler(12, engine=Prescribed()))
    one, two = (gradient(build(GRPO, **settings, correction=c), batch) for c in (None, EngineCorrection()))
    assert distance(two, one) < 1e-6


def test_an_engine_that_is_off_is_refused_only_without_a_correction() -> None:
    settings = plain(GRPO, sampler=Sampler(12, engine=Rounded()))
    with pytest.raises(RuntimeError, match="differ from those of the engine"):
        run(build(GRPO, **settings), prompts(4))
    watch = run(build(GRPO, **settings, correction=EngineCorrection()), prompts(4))
    assert 0.8 < watch.logged[0]["train/engine_weight"] < 1.2
    assert abs(watch.logged[0]["train/engine_kl"]) > 1e-3


def test_an_engine_that_says_nothing_is_one_line() -> None:
    module = build(GRPO, **plain(GRPO, sampler=Sampler(12, engine=Mute())), correction=EngineCorrection())
    with pytest.raises(InputError, match="no log-probabilities"):
        module.draw_loss(prompts(4))
