"""GradeSTE over turns against the sampler unrolled step by step: what an environment says is read, and is no action."""

from typing import Any

import pytest
import torch
from torch import Tensor

from grade_lightning.estimators import StraightThrough
from grade_lightning.functional.divergences import categorical_kl
from grade_lightning.methods import GradeSTE
from grade_lightning.records import Prompts, Rollout
from grade_lightning.rewards import ClassifierReward
from grade_lightning.rollouts import Sampler, Turns
from tests.conftest import VOCABULARY, make_prompts
from tests.methods.test_grade_ste import gradients, make_method, relative, replayed
from tests.rollouts.test_turns import Talks

pytestmark = pytest.mark.usefixtures("own_random_state")


def make(**kwargs: Any) -> GradeSTE:
    sampler = Sampler(max_new_tokens=16, temperature=0.9, engine=Turns(Talks, max_turns=3, turn_tokens=4))
    method = make_method(sampler=sampler, hops="exact", beta=0.3, kl_prefix="full", **kwargs)
    method.estimator = StraightThrough()
    return method


def rolled(method: GradeSTE) -> Rollout:
    """Left padding; one opens with the environment's words, and one is over after a turn."""
    torch.manual_seed(1)
    columns = {"last": [9, 1, 9], "begins": [True, False, False]}
    return method.sampler(method.policy, Prompts.of(make_prompts() | {"columns": columns}))


def unrolled(method: GradeSTE, rollout: Rollout, actions: Tensor) -> Tensor:
    """One token after another, autograd through everything; tokens that are no actions are constants."""
    policy, reward, tau = method.policy, method.reward, method.tau(0, 1)
    assert isinstance(reward, ClassifierReward)
    tokens, prompt = rollout.completion_ids, rollout.prompt_ids.shape[1]
    soft, judged = policy.embed(rollout.prompt_ids), reward.table()[rollout.prompt_ids]
    reference, table = policy.frozen.embed(rollout.prompt_ids), policy.embed(torch.arange(VOCABULARY))
    divergence = soft.new_zeros(len(tokens))
    for t in range(tokens.shape[1]):
        attention = rollout.mask[:, : prompt + t]
        logits = policy(soft, attention, 1)
        own, held = (
            method.sampler.distribution.log_distribution(x)[:, 0]
            for x in (logits, policy.frozen.logits(reference, attention, 1))
        )
        divergence = divergence + actions[:, t] * categorical_kl(own, held)
        sampled = method.sampler.distribution.logits(logits, rollout.eos_ids, tokens[:, t : t + 1])[:, 0]
        relaxed = torch.softmax(sampled.log_softmax(-1) / tau, dim=-1)
        one_hot = torch.nn.functional.one_hot(tokens[:, t], VOCABULARY).to(relaxed.dtype)
        token = (one_hot + actions[:, t, None] * (relaxed - relaxed.detach()))[:, None]
        soft = torch.cat([soft, token @ table], dim=1)
        reference = torch.cat([reference, token @ policy.frozen.table()], dim=1)
        judged = torch.cat([judged, token @ reward.table()], dim=1)
    objective = reward.score_embeddings(judged, rollout.mask) - method.beta * divergence
    (-objective.mean()).backward()
    return gradients(method)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_gradient_flows_through_the_policy_s_own_tokens_alone(lora: bool) -> None:
    """As unrolled with the environment's tokens as constants; with these as actions it is another gradient."""
    method = make(lora=lora)
    rollout = rolled(method)
    heard = rollout.completion_mask & ~rollout.sampled
    assert heard.sum(-1).tolist()[1] == 0
    assert heard.sum() >= 7
    found = replayed(method, rollout)
    assert relative(found, unrolled(method, rollout, rollout.sampled)) < 1e-10
    assert relative(unrolled(method, rollout, rollout.completion_mask), found) > 0.05


def test_what_the_environment_says_is_attended_to() -> None:
    """The same tokens of the policy after other answers: another gradient, which is the unrolled one."""
    method = make()
    rollout = rolled(method)
    before = replayed(method, rollout)
    heard = rollout.completion_mask & ~rollout.sampled
    rollout.completion_ids = torch.where(heard, 7, rollout.completion_ids)
    after = replayed(method, rollout)
    assert relative(after, before) > 0.05
    assert relative(after, unrolled(method, rollout, rollout.sampled)) < 1e-10
