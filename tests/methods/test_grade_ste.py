"""GradeSTE against the truth: the gradient of the sampler unrolled step by step, with the same noise."""

import shutil
from pathlib import Path
from typing import Any, Literal, cast

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from grade_lightning.errors import InputError
from grade_lightning.estimators import Gumbel, ReinMax, ReinMaxRao, StraightThrough, TokenEstimator
from grade_lightning.functional.divergences import categorical_kl
from grade_lightning.functional.gumbel import exponential_noise, posterior_scores
from grade_lightning.functional.vocabulary import ELEMENTS, TIMES, positions_at_once
from grade_lightning.methods import GradeSTE
from grade_lightning.policies import LoRA, Policy
from grade_lightning.records import Experience, Prompts, Rollout
from grade_lightning.rewards import Classifier, ClassifierReward
from grade_lightning.rollouts import Sampler
from grade_lightning.schedules import Constant
from tests.conftest import CONFIGS, VOCABULARY, make_model, make_prompts, make_tokenizer, mostly_slow

KLPrefix = Literal["none", "policy", "full"]


def make_method(
    name: str = "gpt2", lora: bool = False, dtype: torch.dtype = torch.float64, draws: int = 1, **kwargs: Any
) -> GradeSTE:
    policy = Policy.from_model(make_model(name, dtype), make_tokenizer(), LoRA(r=2, dropout=0.0) if lora else None)
    for parameter_name, parameter in policy.named_parameters():  # away from the reference
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(parameter_name)))
            parameter.data.add_(0.1 * noise)
    torch.manual_seed(7)
    classifier = Classifier(cast(PreTrainedModel, make_model(name, dtype).base_model), hidden=8).to(dtype)
    with torch.no_grad():
        for layer in classifier.head.parameters():
            layer.mul_(3)
        # its row of zeros, behind an RMSNorm, has a gradient that all else is small against
        cast(torch.nn.Embedding, classifier.backbone.get_input_embeddings()).weight[1].normal_(std=0.2)
    kwargs = {"sampler": Sampler(max_new_tokens=8, top_k=kwargs.pop("top_k", None), temperature=0.9)} | kwargs
    return GradeSTE(
        policy, ClassifierReward.from_classifier(classifier), estimator=Gumbel(draws), tau=Constant(0.8), **kwargs
    )


def roll(method: GradeSTE) -> Rollout:
    """A rollout with left padding, in which one completion ends early and one does not."""
    for seed in range(50):
        torch.manual_seed(seed)
        rollout = method.sampler(method.policy, Prompts.of(make_prompts()))
        if rollout.ended.any() and not rollout.ended.all() and rollout.lengths.min() > 2:
            return rollout
    raise AssertionError("no rollout of the wanted kind")


def gradients(method: GradeSTE) -> Tensor:
    parts = [p.grad.flatten() for p in method.parameters() if p.requires_grad and p.grad is not None]
    gradient = torch.cat(parts).clone()
    method.zero_grad()
    return gradient


def replayed(method: GradeSTE, rollout: Rollout) -> Tensor:
    torch.manual_seed(3)
    method.loss(Experience(rollout, method.reward.pathwise(rollout))).loss.backward()
    return gradients(method)


def unrolled(method: GradeSTE, rollout: Rollout, kl_prefix: KLPrefix = "full", held: bool = False) -> Tensor:
    """The published computation: one step after another, the whole prefix each time, autograd through everything.

    If held, the policy reads its own tokens as they are; only the reward reads them as functions of the policy.
    """
    policy, reward, tau = method.policy, method.reward, method.tau(0, 1)
    assert isinstance(reward, ClassifierReward)
    tokens, mask = rollout.completion_ids, rollout.completion_mask
    with torch.no_grad():
        logits = policy(policy.embed(rollout.ids[:, :-1]), rollout.mask[:, :-1], tokens.shape[1])
        logps = method.sampler.distribution.logits(logits, rollout.eos_ids, tokens).log_softmax(-1)
        torch.manual_seed(3)
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        exponential = rollout.put(exponential_noise(rollout.take(logps), generator))
        noise = posterior_scores(logps, tokens, exponential) - logps

    def distribution(logits: Tensor) -> Tensor:
        return method.sampler.distribution.log_distribution(logits)[:, 0]

    prompt = rollout.prompt_ids.shape[1]
    soft, judged = policy.embed(rollout.prompt_ids), reward.table()[rollout.prompt_ids]
    reference = policy.frozen.embed(rollout.prompt_ids)
    table = policy.embed(torch.arange(VOCABULARY))
    divergence = soft.new_zeros(len(tokens))
    for t in range(tokens.shape[1]):
        attention = rollout.mask[:, : prompt + t]
        step_logits = policy(soft, attention, 1)
        p = policy(policy.embed(rollout.ids[:, : prompt + t]), attention, 1) if kl_prefix == "none" else step_logits
        q = policy.frozen.logits(reference if kl_prefix == "full" else reference.detach(), attention, 1)
        divergence = divergence + mask[:, t] * categorical_kl(distribution(p), distribution(q))
        sampled = method.sampler.distribution.logits(step_logits, rollout.eos_ids, tokens[:, t : t + 1])
        ell = sampled[:, 0].log_softmax(-1)
        relaxed = torch.softmax(torch.where(ell.isinf(), ell, ell + noise[:, t]) / tau, dim=-1)
        one_hot = torch.nn.functional.one_hot(tokens[:, t], ell.shape[-1]).to(ell.dtype)
        token = (one_hot + relaxed - relaxed.detach())[:, None]
        soft = torch.cat([soft, (token.detach() if held else token) @ table], dim=1)
        reference = torch.cat([reference, token @ policy.frozen.table()], dim=1)
        judged = torch.cat([judged, token @ reward.table()], dim=1)
    objective = reward.score_embeddings(judged, rollout.mask) - method.beta * divergence
    (-objective.mean()).backward()
    return gradients(method)


def relative(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", mostly_slow(CONFIGS, "gpt2", "llama"))
def test_exact_hops_equal_the_unrolled_sampler(name: str, lora: bool) -> None:
    """Reward and KL with its whole prefix path, left padding, an early end: the same gradient."""
    method = make_method(name, lora, hops="exact", beta=0.3, kl_prefix="full")
    rollout = roll(method)
    truth = unrolled(method, rollout)
    # transformers computes RMSNorm and rotary embeddings in float32 even in a float64 model
    assert relative(replayed(method, rollout), truth) < (1e-10 if name == "gpt2" else 1e-5)
    assert truth.norm() > 1e-3


@pytest.mark.parametrize("name", mostly_slow(CONFIGS, "gpt2", "llama"))
def test_without_hops_each_token_is_moved_with_the_later_ones_held(name: str) -> None:
    """The default."""
    method = make_method(name, beta=0.3)
    rollout = roll(method)
    truth = unrolled(method, rollout, kl_prefix="none", held=True)
    assert relative(replayed(method, rollout), truth) < (1e-10 if name == "gpt2" else 1e-5)
    assert relative(unrolled(method, rollout, kl_prefix="none"), truth) > 1e-3


@pytest.mark.parametrize("kl_prefix", ["policy", "full"])
def test_the_prefix_of_the_kl_needs_hops(kl_prefix: KLPrefix) -> None:
    with pytest.raises(InputError, match=f"kl_prefix = {kl_prefix}.* set hops to 1 or more"):
        GradeSTE(kl_prefix=kl_prefix)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", mostly_slow(CONFIGS, "gpt2", "llama"))
def test_a_few_positions_at_a_time_are_the_same(name: str, lora: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The estimator without noise, since the noise of a chunk has a seed of its own."""
    method = make_method(name, lora, hops="exact", beta=0.3, kl_prefix="full")
    method.estimator = ReinMax()
    rollout = roll(method)
    whole = replayed(method, rollout)
    monkeypatch.setitem(ELEMENTS, "cpu", 4 * VOCABULARY // TIMES)
    assert positions_at_once(VOCABULARY, "cpu") == 4
    assert relative(replayed(method, rollout), whole) < (1e-12 if name == "gpt2" else 1e-6)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a processor")
def test_a_compiled_policy_is_the_same() -> None:
    method = make_method("llama", hops=2, beta=0.3)
    rollout, names = roll(method), set(method.state_dict())
    truth = replayed(method, rollout)
    method.policy.torch_compile = True
    assert relative(replayed(method, rollout), truth) < 1e-5
    assert method.policy._compiled is not None
    assert set(method.state_dict()) == names


@pytest.mark.parametrize("kl_prefix", ["none", "policy", "full"])
@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.parametrize("name", mostly_slow(CONFIGS, "llama"))
def test_kl_prefix_and_top_k(name: str, kl_prefix: KLPrefix, top_k: int | None) -> None:
    method = make_method(name, hops="exact", beta=0.3, kl_prefix=kl_prefix, top_k=top_k)
    rollout = roll(method)
    truth = unrolled(method, rollout, kl_prefix=kl_prefix)
    assert relative(replayed(method, rollout), truth) < (1e-10 if name == "gpt2" else 1e-5)


@pytest.mark.parametrize(
    "estimator", [StraightThrough(), ReinMax(), ReinMaxRao(2), Gumbel(4)], ids=lambda e: type(e).__name__
)
def test_every_estimator_falls_off_with_hops(estimator: TokenEstimator) -> None:
    """The error against the exact adjoint shrinks with hops and is zero at T − 1; more hops change nothing."""
    method = make_method(hops="exact")
    method.estimator = estimator
    rollout = roll(method)
    truth = replayed(method, rollout)
    errors = []
    for hops in (0, 1, 2, 4, 7, 20):
        method.hops = hops
        errors.append(relative(replayed(method, rollout), truth))
    assert errors[0] > 1e-2
    assert errors[4] == errors[5] == 0
    assert errors == sorted(errors, reverse=True)


@pytest.mark.slow
def test_gumbel_rao_has_the_mean_of_single_draws_and_less_spread() -> None:
    """At a fixed rollout: many single draws and many 4-draw means agree within their noise."""
    method = make_method(hops=2)
    rollout = roll(method)
    scores = method.reward.pathwise(rollout)

    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        method.loss(Experience(rollout, scores)).loss.backward()
        return gradients(method)

    singles = torch.stack([draw(seed) for seed in range(150)])
    method.estimator = Gumbel(4)
    means = torch.stack([draw(seed) for seed in range(150)])
    spread = singles.var(0).sum()
    assert means.var(0).sum() < 0.5 * spread
    # |difference of means|² has the expectation (spread + spread of the means) / 150 if the means agree
    assert (singles.mean(0) - means.mean(0)).square().sum() < 2 * (spread + means.var(0).sum()) / 150


def test_nothing_flows_through_positions_after_the_end() -> None:
    """Garbage after the end-of-sequence token changes no gradient."""
    method = make_method(hops="exact", beta=0.3, kl_prefix="full")
    rollout = roll(method)
    truth = replayed(method, rollout)
    after = ~rollout.completion_mask
    assert after.any()
    rollout.completion_ids = rollout.completion_ids.masked_fill(after, 5)
    assert relative(replayed(method, rollout), truth) < 1e-12


def test_dropout_is_drawn_once_and_shared_by_all_hops() -> None:
    """With LoRA dropout the gradient is that of one network: exact hops equal twice as many."""
    method = make_method(lora=True, hops="exact")
    for module in method.policy.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    method.train()
    rollout = roll(method)
    truth = replayed(method, rollout)
    method.hops = 30
    assert relative(replayed(method, rollout), truth) == 0
    torch.manual_seed(4)
    method.loss(Experience(rollout, method.reward.pathwise(rollout))).loss.backward()
    assert relative(gradients(method), truth) > 1e-3  # other noise and another mask


@pytest.mark.slow
@pytest.mark.parametrize("tau", [2.0, 1.0, 0.5])
def test_few_hops_are_close_on_a_trained_model(tau: float, shared: Path) -> None:
    """Four hops give the direction on a real model: the cosine to the exact gradient is above 0.999."""
    policy = Policy(str(shared / "models" / "stories260K"))
    policy.load()
    policy.model.double()
    assert policy.reference is not None
    policy.reference.double()
    torch.manual_seed(5)
    classifier = Classifier(cast(PreTrainedModel, policy.reference.base_model), hidden=16).double()
    method = GradeSTE(
        policy,
        ClassifierReward.from_classifier(classifier, output="logit"),
        sampler=Sampler(max_new_tokens=48),
        tau=Constant(tau),
        hops="exact",
    )
    ids = policy.tokenizer(["Once upon a time", "One day, Tom went"], return_tensors="pt", padding=True)
    torch.manual_seed(0)
    rollout = method.sampler(policy, Prompts(ids["input_ids"], ids["attention_mask"]))
    truth = replayed(method, rollout)
    errors, cosines = [], []
    for hops in (0, 1, 2, 4, 8):
        method.hops = hops
        found = replayed(method, rollout)
        errors.append(relative(found, truth))
        cosines.append(float(torch.nn.functional.cosine_similarity(found, truth, dim=0)))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-2
    assert cosines[3] > 0.999
