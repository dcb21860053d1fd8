"""Grade against the truth: value and gradient of a plain loop without cache, checkpoints or closed forms."""

from typing import Any, NamedTuple, cast

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot
from transformers import PreTrainedModel

from grade_lightning.errors import InputError
from grade_lightning.functional.gumbel import exponential_noise
from grade_lightning.methods import Grade
from grade_lightning.methods.grade import RelaxedExperience
from grade_lightning.policies import LoRA, Policy
from grade_lightning.records import StepOutput
from grade_lightning.rewards import Classifier, ClassifierReward
from grade_lightning.rollouts import Sampler
from grade_lightning.schedules import Constant, Linear
from tests.conftest import CONFIGS, VOCABULARY, make_model, make_prompts, make_tokenizer, mostly_slow

LENGTH = 8
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "top-k": {"top_k": 5, "temperature": 0.9},
    "minimum": {"top_k": 7, "min_new_tokens": 4},
}


def make_method(
    name: str = "gpt2",
    lora: bool = False,
    dtype: torch.dtype = torch.float64,
    moved: bool = True,
    sampler: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Grade:
    policy = Policy.from_model(make_model(name, dtype), make_tokenizer(), LoRA(r=2, dropout=0.0) if lora else None)
    for parameter_name, parameter in policy.named_parameters():  # away from the reference
        if parameter.requires_grad and moved:
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(parameter_name)))
            parameter.data.add_(0.1 * noise)
    torch.manual_seed(7)
    classifier = Classifier(cast(PreTrainedModel, make_model(name, dtype).base_model), hidden=8).to(dtype)
    with torch.no_grad():
        for layer in classifier.head.parameters():
            layer.mul_(3)
    settings = {"max_new_tokens": LENGTH} | ({"top_k": 5, "temperature": 0.9} if sampler is None else sampler)
    defaults: dict[str, Any] = {"tau": Constant(0.8), "beta": 0.3, "sampler": Sampler(**settings), "top_k": None}
    return Grade(policy, ClassifierReward.from_classifier(classifier), **defaults | kwargs)


def gradients(method: Grade) -> Tensor:
    parts = [p.grad.flatten() for p in method.parameters() if p.requires_grad and p.grad is not None]
    gradient = torch.cat(parts).clone()
    method.zero_grad()
    return gradient


def step(method: Grade, seed: int) -> tuple[RelaxedExperience, StepOutput, Tensor]:
    torch.manual_seed(seed)
    experience = method.collect(make_prompts())
    result = method.loss(experience)
    result.loss.backward()
    return experience, result, gradients(method)


class Plain(NamedTuple):
    """What the plain loop found."""

    loss: float
    reward: Tensor
    kl: Tensor
    tokens: Tensor
    mask: Tensor
    gradient: Tensor


def plain(method: Grade, seed: int) -> Plain:
    """The whole prefix again at each step, dense soft tokens, the KL and the reference within the loop."""
    policy, reward, distribution, tau = method.policy, method.reward, method.sampler.distribution, method.tau(0, 1)
    assert isinstance(reward, ClassifierReward)
    torch.manual_seed(seed)
    prompts = make_prompts()
    ids, mask = prompts["input_ids"], prompts["attention_mask"]
    table = policy.embed(torch.arange(VOCABULARY))
    soft, judged, reference = policy.embed(ids), reward.table()[ids], policy.frozen.embed(ids)
    ended = torch.zeros(len(ids), dtype=torch.bool)
    divergences, tokens, masks = [], [], []
    for t in range(distribution.max_new_tokens):
        logits = policy(soft, mask, 1)[:, 0]
        p, q = (
            (x / distribution.temperature).softmax(-1) for x in (logits, policy.frozen.logits(reference, mask, 1)[:, 0])
        )
        divergences.append((p * (p.log() - q.log())).sum(-1))
        restricted = logits / distribution.temperature
        if t < distribution.min_new_tokens:
            restricted = torch.where(torch.arange(VOCABULARY) == 0, -torch.inf, restricted)
        if distribution.top_k is None:
            order = torch.arange(VOCABULARY).expand_as(restricted)
        else:
            order = restricted.argsort(dim=-1, descending=True)[:, : distribution.top_k]
        ell = restricted.gather(-1, order).log_softmax(-1)
        perturbed = ell - exponential_noise(ell).log()
        token = torch.zeros_like(logits).scatter(-1, order, (perturbed / tau).softmax(-1))
        tokens.append(token.argmax(-1))
        masks.append(~ended)
        mask = torch.cat([mask, (~ended).long()[:, None]], dim=1)
        ended = ended | (tokens[-1] == 0)
        soft, judged, reference = (
            torch.cat([x, (token @ rows)[:, None]], dim=1)
            for x, rows in ((soft, table), (judged, reward.table()), (reference, policy.frozen.table()))
        )
        if ended.all():
            break
    kept = torch.stack(masks, dim=1)
    kl = torch.stack(divergences, dim=1)
    scores = reward.score_embeddings(judged, mask)
    loss = -(scores.mean() - method.beta * (kl * kept).sum(-1).mean())
    loss.backward()
    return Plain(loss.item(), scores.detach(), kl.detach(), torch.stack(tokens, dim=1), kept, gradients(method))


def seed_with_ends(method: Grade) -> int:
    """A seed with left padding, in which one completion ends early and one does not."""
    for seed in range(100):
        torch.manual_seed(seed)
        with torch.no_grad():
            rollout = method.collect(make_prompts()).rollout
        if 2 < rollout.lengths.min() < rollout.lengths.max() and not rollout.ended.all():
            return seed
    raise AssertionError("no rollout of the wanted kind")


def relative(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


def assert_equal_to_the_plain_loop(method: Grade, tolerance: float) -> None:
    seed = seed_with_ends(method)
    truth = plain(method, seed)
    experience, result, gradient = step(method, seed)
    keep = experience.rollout.completion_mask
    assert torch.equal(keep, truth.mask)
    assert torch.equal(experience.rollout.completion_ids[keep], truth.tokens[keep])
    torch.testing.assert_close(experience.scores.total, truth.reward, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(result.stats.kl[keep], truth.kl[keep], rtol=tolerance, atol=tolerance)
    assert result.loss.item() == pytest.approx(truth.loss, rel=tolerance, abs=tolerance)
    assert relative(gradient, truth.gradient) < tolerance
    assert truth.gradient.norm() > 1e-3


@pytest.mark.parametrize("block", mostly_slow([1, 2, 3, LENGTH], 2))
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", mostly_slow(CONFIGS, "gpt2", "llama"))
def test_value_and_gradient_are_those_of_the_plain_loop(name: str, lora: bool, block: int) -> None:
    """Reward, KL, loss and gradient, with left padding, early ends, tied and scaled embeddings."""
    # transformers computes RMSNorm in float32 even in a float64 model
    tolerance = 1e-10 if name in ("gpt2", "gpt_neox") else 1e-6
    assert_equal_to_the_plain_loop(make_method(name, lora, block=block), tolerance)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("tau", [0.3, 2.0])
def test_every_support_and_temperature(settings: dict[str, Any], tau: float) -> None:
    assert_equal_to_the_plain_loop(make_method(sampler=settings, tau=Constant(tau), block=3), 1e-10)


def test_without_kl_the_reward_alone_is_differentiated() -> None:
    method = make_method(beta=0.0, block=3)
    assert_equal_to_the_plain_loop(method, 1e-10)
    result = method.loss(method.collect(make_prompts()))
    assert result.stats.kl.sum() > 0.01  # it is measured all the same


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_at_the_start_the_policy_is_its_reference(lora: bool) -> None:
    method = make_method(lora=lora, moved=False)
    experience, result, _ = step(method, 0)
    keep = experience.rollout.completion_mask
    assert result.stats.kl[keep].abs().max() < 1e-12
    assert result.stats.log_ratio[keep].abs().max() < 1e-12


def test_what_is_logged() -> None:
    """Against the plain definitions."""
    method = make_method(sampler={}, block=3)
    experience, result, _ = step(method, seed_with_ends(method))
    rollout, keep = experience.relaxed, experience.rollout.completion_mask
    logps = rollout.logits.log_softmax(-1)
    hard = one_hot(rollout.completion_ids, VOCABULARY).bool()
    torch.testing.assert_close(result.stats.logps[keep], logps[hard].view(keep.shape)[keep])
    torch.testing.assert_close(result.stats.entropy, -(logps.exp() * logps).sum(-1))
    torch.testing.assert_close(result.metrics["soft_gap"], 1 - rollout.weights[hard].view(keep.shape)[keep].mean())
    assert float(result.metrics["tau"]) == 0.8
    assert result.stats.log_ratio.shape == keep.shape
    soft = method.policy.frozen.embed(rollout.prompt_ids), rollout.embed(method.policy.frozen.table())[:, :-1]
    q = method.policy.frozen.logits(torch.cat(soft, dim=1), rollout.mask[:, :-1], keep.shape[1]).log_softmax(-1)
    torch.testing.assert_close(result.stats.log_ratio[keep], (logps - q)[hard].view(keep.shape)[keep])
    for value in (
        result.stats.logps,
        result.stats.kl,
        result.stats.entropy,
        result.stats.log_ratio,
        *result.metrics.values(),
    ):
        assert not value.requires_grad


def test_what_is_kept_of_a_step_holds_no_graph() -> None:
    """Else the logits of one step would be in memory during the next."""
    experience, _, _ = step(make_method(), 0)
    for kept in (experience.rollout, experience.scores):
        tensors = [value for value in vars(kept).values() if isinstance(value, Tensor)]
        assert tensors
        assert not any(value.requires_grad for value in tensors)
    assert not any(value.requires_grad for value in experience.scores.parts.values())


def test_defaults_are_the_papers() -> None:
    method = Grade(make_method().policy, make_method().reward)
    assert method.soft.top_k == 256
    assert isinstance(method.tau, Linear)
    assert (method.tau(0, 10), method.tau(10, 10)) == (2.0, 0.5)
    assert (method.engine.block, make_method(block=3).engine.block) == (8, 3)


def test_the_schedule_reaches_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Grade, "global_step", 5)
    monkeypatch.setattr(Grade, "total_steps", lambda self: 10)
    assert float(step(make_method(tau=Linear(2.0, 0.5)), 0)[1].metrics["tau"]) == 1.25

    method = make_method(tau=Constant(2.0))
    hot, _, _ = step(method, 0)
    method.tau = Constant(0.1)
    cold, _, _ = step(method, 0)
    assert (hot.relaxed.tau, cold.relaxed.tau) == (2.0, 0.1)
    assert hot.relaxed.weights.amax(-1).mean() < cold.relaxed.weights.amax(-1).mean()


def test_the_reward_is_raised_by_its_own_gradient() -> None:
    """A small step along the gradient changes the objective by step times its squared norm."""
    method = make_method(block=3)
    seed = seed_with_ends(method)
    _, before, gradient = step(method, seed)
    size = 1e-7 / float(gradient.norm() ** 2)
    with torch.no_grad():
        start = 0
        for parameter in method.parameters():
            if parameter.requires_grad:
                parameter.sub_(size * gradient[start : start + parameter.numel()].view_as(parameter))
                start += parameter.numel()
    assert start == len(gradient)
    _, after, _ = step(method, seed)
    assert (before.loss - after.loss).item() == pytest.approx(1e-7, rel=1e-3)


def test_the_support_is_the_papers_unless_the_sampler_has_its_own() -> None:
    """Also when another field of the sampler is set; evaluation samples by the sampler that was given."""
    policy, reward, sampler = make_method().policy, make_method().reward, Sampler(max_new_tokens=4)
    for given, top_k, support in ((sampler, 256, 256), (Sampler(top_k=7), 256, 7), (sampler, None, None)):
        method = Grade(policy, reward, sampler=given, top_k=top_k)
        assert method.soft.top_k == support
        assert method.soft.max_new_tokens == given.max_new_tokens
        assert method.sampler is given
    assert sampler.distribution.top_k is None


def test_its_kl_is_of_the_distribution_that_soft_tokens_are_drawn_from() -> None:
    """The same support by either argument; the whole vocabulary is another."""
    settings: list[dict[str, Any]] = [{"sampler": {"top_k": 5}}, {"sampler": {}, "top_k": 5}, {"sampler": {}}]
    by_sampler, by_argument, whole = (float(step(make_method(**one), 0)[1].stats.kl.sum()) for one in settings)
    assert by_argument == pytest.approx(by_sampler, rel=1e-9)
    assert abs(whole - by_sampler) > 1e-3


class Abstains(ClassifierReward):
    """Of the first completion."""

    def score_embeddings(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        scores = super().score_embeddings(embeddings, mask)
        return scores.where(torch.arange(len(scores)) > 0, torch.nan)


def test_a_reward_that_abstains_counts_as_nothing() -> None:
    """Neither in the value nor in the gradient; the mean is over all completions."""
    method, whole = make_method(beta=0.0), make_method(beta=0.0)
    assert isinstance(method.reward, ClassifierReward)
    assert method.reward.classifier is not None
    method.reward = Abstains.from_classifier(method.reward.classifier)
    _, result, gradient = step(method, 3)
    experience, _, _ = step(whole, 3)
    rewards = experience.reward.detach()
    torch.testing.assert_close(result.loss.detach(), -rewards[1:].sum() / len(rewards))
    torch.manual_seed(3)
    (-whole.collect(make_prompts()).reward[1:].sum() / len(rewards)).backward()
    torch.testing.assert_close(gradient, gradients(whole))


def test_soft_tokens_say_no_stop_strings() -> None:
    with pytest.raises(InputError, match=r"--model.sampler.stop: soft tokens form no strings; .* use GradeSTE"):
        Grade(sampler=Sampler(stop="w3"))
