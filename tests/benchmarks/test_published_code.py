"""What the published code did is done as faithfully, and each fault is where it is said to be."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.published_code import (
    CompletionReward,
    PublishedBaseline,
    PublishedKL,
    PublishedPPO,
    PublishedReinforce,
    WithoutContext,
    penalised,
)
from grade_lightning.distributed import Reduce
from grade_lightning.functional.aggregation import Normalizers
from grade_lightning.kl import KL
from grade_lightning.methods import GradeSTE
from grade_lightning.policies import Policy
from grade_lightning.records import Experience, Prompts, Scores
from grade_lightning.rewards.classifier import Classifier
from grade_lightning.rollouts import Distribution, Sampler
from tests.conftest import make_model, make_prompts, make_tokenizer
from tests.methods.toy_task import Recorder, batches, make, trainer

baselines = pytest.mark.parametrize("method", [PublishedReinforce, PublishedPPO])


pytestmark = pytest.mark.usefixtures("own_random_state")


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_rollouts_are_those_of_generate_in_training_mode_with_checkpointing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompts = make_model(name), make_prompts((5, 5))
    policy = Policy.from_model(model, make_tokenizer())
    own = Distribution(8, 8, top_k=1)
    found = WithoutContext().generate(policy, own, Prompts.of(prompts))
    again: Any = make_model(name)
    again.train()
    again.gradient_checkpointing_enable()
    # transformers 5.24 drops the cache only where a graph is made; the published code had an earlier one
    monkeypatch.setattr(torch, "is_grad_enabled", lambda: True)
    theirs = again.generate(**prompts, do_sample=False, max_new_tokens=8, min_new_tokens=8, pad_token_id=1)
    monkeypatch.undo()
    assert found.completion_ids.tolist() == theirs[:, 5:].tolist()
    proper = Sampler(max_new_tokens=8, min_new_tokens=8, top_k=1)(policy, Prompts.of(prompts))
    assert found.completion_ids.tolist() != proper.completion_ids.tolist()


def experience(module: PublishedBaseline, values: Tensor | None = None) -> Experience:
    """Two completions of one length, with statistics of which the log-ratios are made up."""
    module.configure_model()
    seen = module.sample(Prompts.of(make_prompts((5, 3))))
    with torch.no_grad():
        old = module.measure(seen.rollout)
    drift = torch.linspace(-1, 1, old.log_ratio.numel()).view_as(old.log_ratio)
    old = replace(old, log_ratio=drift, values=old.values if values is None else values)
    return replace(seen, old=old, normalizers=Normalizers(float(seen.sampled.sum()), 2))


def test_standardised_over_a_batch_of_two_a_reward_is_its_sign() -> None:
    module = make(PublishedReinforce, kl=KL(0.1))
    assert isinstance(module, PublishedReinforce)
    found = experience(module)
    for rewards in ([0.2, 0.9], [0.5, 0.50001]):
        near = replace(found, scores=Scores(torch.tensor(rewards, dtype=torch.float64), {}))
        near.old.log_ratio.zero_()
        advantages = module.advantage(near, Reduce())
        assert advantages[:, 0].tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5], rel=1e-2)


def test_the_kl_in_the_reward_is_a_mean_over_tokens() -> None:
    module = make(PublishedReinforce, kl=KL(0.1))
    assert isinstance(module, PublishedReinforce)
    found = experience(module)
    rows = [
        float(reward) - 0.1 * sum(ratio[:n].tolist()) / n
        for reward, ratio, n in zip(
            found.scores.total, found.old.log_ratio, found.rollout.lengths.tolist(), strict=True
        )
    ]
    torch.testing.assert_close(penalised(found), torch.tensor(rows))


def test_advantages_run_over_the_batch() -> None:
    """Written out for two completions, of which the second is shorter."""
    module = make(PublishedPPO, kl=KL(0.1), sampler=Sampler(6, 6), gamma=0.99, lam=0.95)
    assert isinstance(module, PublishedPPO)
    found, values = experience(module, values=torch.randn(2, 6)), torch.randn(2, 6)
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    rollout = replace(found.rollout, completion_mask=mask, sampled=mask)
    found = replace(found, rollout=rollout, old=replace(found.old, values=values))
    one, two = penalised(found)
    rewards = torch.zeros(2, 6)
    rewards[:, -1] = torch.stack([one, two])
    below = rewards[1] - values[1]
    above = rewards[0] + 0.99 * values[1] - values[0] + 0.99 * 0.95 * below
    estimates = torch.stack([above, below])
    done = module.appraise(found, found.old)
    torch.testing.assert_close(done.returns, estimates + values)
    white = (estimates - estimates[mask].mean()) / estimates[mask].std(correction=0)
    torch.testing.assert_close(done.advantages, white.masked_fill(~mask, 0), rtol=1e-4, atol=1e-5)
    better = module.appraise(replace(found, scores=Scores(found.scores.total + 1, {})), found.old)
    assert better.returns is not None
    assert done.returns is not None
    moved = (better.returns - done.returns) != 0
    assert moved[mask].tolist() == [False] * 5 + [True] + [False] * 4  # nothing but one token knows of a reward


@baselines
def test_it_trains_what_it_can(method: type[PublishedBaseline]) -> None:
    module, recorder = make(method), Recorder()
    trainer(max_steps=4, callbacks=[recorder, PublishedKL()]).fit(module, batches())
    assert recorder.without_gradient[0] <= {"critic.head.weight"}
    assert recorder.steps[0]["train/kl"] == pytest.approx(0, abs=1e-5)
    assert recorder.steps[0]["published/kl"] > 0.05
    # samples that are not the policy's own: an estimate of the KL from them need not be positive, and the gap is wide
    rollout = module.last_rollout[0]
    assert rollout.engine_logps is not None
    assert abs(float((rollout.engine_logps - module.measure(rollout).logps).mean())) > 0.1


def test_the_entropy_bonus() -> None:
    plain, bonus = (make(PublishedPPO, entropy_coef=c, sampler=Sampler(max_new_tokens=4)) for c in (0.0, 0.5))
    losses = []
    for module in (plain, bonus):
        assert isinstance(module, PublishedPPO)
        torch.manual_seed(1)
        seen = experience(module)
        found = module.appraise(seen, seen.old)
        losses.append(float(module.add_terms(found, found.old).loss.detach()))
        entropy = float(found.old.entropy[found.rollout.completion_mask].mean())
    assert losses[0] - losses[1] == pytest.approx(0.5 * entropy, rel=1e-4)


def test_the_reward_is_trained_on_the_completion_alone_and_measured_on_all() -> None:
    model = make_model("llama")
    reward = CompletionReward()
    reward.classifier = Classifier(model.base_model, hidden=8).requires_grad_(False).eval()  # type: ignore[arg-type]
    policy = Policy.from_model(make_model("llama"), make_tokenizer())
    rollout = Sampler(4)(policy, Prompts.of(make_prompts((4, 4))))
    other = replace(rollout, prompt_ids=rollout.prompt_ids.roll(1, 0))
    one, two = (reward.pathwise(x) for x in (rollout, other))
    assert one.total.tolist() == two.total.tolist()
    assert one.adjoints[0].gradient.any()
    assert reward.score(rollout).total.tolist() != reward.score(other).total.tolist()


def test_the_published_kl_of_a_policy_that_is_its_reference() -> None:
    """Of a token, and after it: no KL that was trained with could be as large, and ours is 0."""
    recorder = Recorder()
    trainer(max_steps=1, callbacks=[recorder, PublishedKL()]).fit(make(GradeSTE, beta=0.0), batches())
    assert recorder.steps[0]["train/kl"] == pytest.approx(0, abs=1e-5)
    assert recorder.steps[0]["published/kl"] > 0.05
