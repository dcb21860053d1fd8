"""GradeSTE against the truth: the gradient of the sampler unrolled step by step, with the same noise."""

from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from grade_lightning.estimators import Gumbel, ReinMax, StraightThrough, TokenEstimator
from grade_lightning.functional.divergences import categorical_kl
from grade_lightning.functional.gumbel import exponential_noise, posterior_scores
from grade_lightning.methods import GradeSTE
from grade_lightning.policies import LoRA, Policy
from grade_lightning.rewards import Classifier, ClassifierReward, WeightedSum
from grade_lightning.rollouts import Rollout, Sampler
from grade_lightning.schedules import Constant
from tests.conftest import CONFIGS, make_model, make_prompts, make_tokenizer

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
    classifier = Classifier(make_model(name, dtype).base_model, hidden=8).to(dtype)
    with torch.no_grad():
        for layer in classifier.head.parameters():
            layer.mul_(3)
    kwargs = {"sampler": Sampler(max_new_tokens=8, top_k=kwargs.pop("top_k", None), temperature=0.9)} | kwargs
    return GradeSTE(
        policy, ClassifierReward.from_classifier(classifier), estimator=Gumbel(draws), tau=Constant(0.8), **kwargs
    )


def roll(method: GradeSTE) -> Rollout:
    """A rollout with left padding, in which one completion ends early and one does not."""
    for seed in range(50):
        torch.manual_seed(seed)
        rollout = method.sampler(method.policy, **make_prompts())
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
    method.loss(rollout, method.reward.pathwise(rollout)).loss.backward()
    return gradients(method)


def unrolled(method: GradeSTE, rollout: Rollout, kl_prefix: KLPrefix = "full") -> Tensor:
    """The published computation: one step after another, the whole prefix each time, autograd through everything."""
    policy, reward, tau = method.policy, method.reward, method.tau(0, 1)
    assert isinstance(reward, ClassifierReward)
    tokens, mask = rollout.completion_ids, rollout.completion_mask
    with torch.no_grad():
        logits = policy(policy.embed(rollout.ids[:, :-1]), rollout.mask[:, :-1], tokens.shape[1])
        logps = method.sampler.logits(logits, rollout.eos_ids, tokens).log_softmax(-1)
        torch.manual_seed(3)
        noise = posterior_scores(logps, tokens, exponential_noise(logps)) - logps

    def distribution(logits: Tensor) -> Tensor:
        return method.sampler.log_distribution(logits)[:, 0]

    prompt = rollout.prompt_ids.shape[1]
    soft, judged = policy.embed(rollout.prompt_ids), reward.table()[rollout.prompt_ids]
    reference = policy.reference_embed(rollout.prompt_ids)
    embedding = policy.base.get_input_embeddings()
    table = embedding(torch.arange(embedding.weight.shape[0]))
    divergence = soft.new_zeros(len(tokens))
    for t in range(tokens.shape[1]):
        attention = rollout.mask[:, : prompt + t]
        step_logits = policy(soft, attention, 1)
        p = policy(policy.embed(rollout.ids[:, : prompt + t]), attention, 1) if kl_prefix == "none" else step_logits
        q = policy.reference_logits(reference if kl_prefix == "full" else reference.detach(), attention, 1)
        divergence = divergence + mask[:, t] * categorical_kl(distribution(p), distribution(q))
        ell = method.sampler.logits(step_logits, rollout.eos_ids, tokens[:, t : t + 1])[:, 0].log_softmax(-1)
        relaxed = torch.softmax(torch.where(ell.isinf(), ell, ell + noise[:, t]) / tau, dim=-1)
        one_hot = torch.nn.functional.one_hot(tokens[:, t], ell.shape[-1]).to(ell.dtype)
        token = (one_hot + relaxed - relaxed.detach())[:, None]
        soft = torch.cat([soft, token @ table], dim=1)
        reference = torch.cat([reference, token @ policy.reference_table()], dim=1)
        judged = torch.cat([judged, token @ reward.table()], dim=1)
    objective = reward.score_embeddings(judged, rollout.mask) - method.beta * divergence
    (-objective.mean()).backward()
    return gradients(method)


def relative(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", CONFIGS)
def test_exact_hops_equal_the_unrolled_sampler(name: str, lora: bool) -> None:
    """Reward and KL with its whole prefix path, left padding, an early end: the same gradient."""
    method = make_method(name, lora, hops="exact", beta=0.3, kl_prefix="full")
    rollout = roll(method)
    truth = unrolled(method, rollout)
    # transformers computes RMSNorm and rotary embeddings in float32 even in a float64 model
    assert relative(replayed(method, rollout), truth) < (1e-10 if name == "gpt2" else 1e-5)
    assert truth.norm() > 1e-3


@pytest.mark.parametrize("kl_prefix", ["none", "policy", "full"])
@pytest.mark.parametrize("top_k", [None, 5])
def test_kl_prefix_and_top_k(kl_prefix: KLPrefix, top_k: int | None) -> None:
    method = make_method(hops="exact", beta=0.3, kl_prefix=kl_prefix, top_k=top_k)
    rollout = roll(method)
    truth = unrolled(method, rollout, kl_prefix=kl_prefix)
    assert relative(replayed(method, rollout), truth) < 1e-10
