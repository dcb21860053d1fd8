"""The policy and its reference."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from grade_lightning.errors import InputError
from grade_lightning.methods import GradeSTE
from grade_lightning.policies import LoRA, Policy
from grade_lightning.records import Experience, Prompts
from grade_lightning.rewards import Classifier, ClassifierReward
from grade_lightning.rollouts import Sampler
from tests.conftest import VOCABULARY, make_model, make_prompts, make_tokenizer
from tests.policies.making import (
    change,
    every_architecture,
    logits,
    make_policy,
    reference_logits,
    with_and_without_lora,
)


@pytest.mark.parametrize("rows", [VOCABULARY - 1, VOCABULARY + 1])
def test_as_many_logits_as_embedded_tokens(rows: int) -> None:
    model: Any = make_model("llama")
    model.lm_head = torch.nn.Linear(16, rows, bias=False)
    with pytest.raises(InputError, match=rf"embeds {VOCABULARY} tokens, but has logits of {rows}"):
        Policy.from_model(model, make_tokenizer())


def before_5_24(self: Any, input_ids: Tensor, past_key_values: Any = None) -> None: ...


def since_5_24(self: Any, input_ids: Tensor, cache: Any = None) -> None: ...


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(("forward", "name"), [(before_5_24, "past_key_values"), (since_5_24, "cache")])
def test_the_cache_is_called_what_the_model_calls_it(
    forward: Callable[..., None], name: str, lora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy("llama", lora)
    monkeypatch.setattr(type(policy.base), "forward", forward)
    assert policy.cache_name == name


@every_architecture
@with_and_without_lora
def test_the_reference_is_the_start_and_stays(name: str, lora: bool) -> None:
    policy = make_policy(name, lora)
    start = logits(policy)
    reference = reference_logits(policy)
    torch.testing.assert_close(reference, start)
    change(policy)
    assert torch.equal(reference_logits(policy), reference)
    assert (logits(policy) - start).abs().max() > 0.01


@with_and_without_lora
def test_evaluating_restores_every_mode(lora: bool) -> None:
    policy = make_policy(lora=lora).train()
    odd = policy.base.get_input_embeddings().eval()
    before = {name: module.training for name, module in policy.named_modules()}
    assert any(before.values())
    with policy.evaluating() as model:
        assert not any(module.training for module in model.modules())
    assert {name: module.training for name, module in policy.named_modules()} == before
    with pytest.raises(ZeroDivisionError), policy.evaluating():  # a failure restores them, too
        _ = 1 / 0
    assert {name: module.training for name, module in policy.named_modules()} == before
    assert not odd.training


def test_train_leaves_the_reference_in_evaluation_mode() -> None:
    policy = make_policy().train()
    assert policy.model.training
    assert policy.reference is not None
    assert not any(module.training for module in policy.reference.modules())


def make_classifier() -> Classifier:
    backbone: Any = make_model(dtype=torch.float64).base_model
    return Classifier(backbone, hidden=8).double()


@with_and_without_lora
def test_gradient_checkpointing_changes_no_gradient(lora: bool, folder: Path) -> None:
    """GRADE-STE differentiates through the same graph several times (hops); recomputation must allow that."""
    found = []
    for checkpointing in (False, True):
        adapters = LoRA(r=2, dropout=0.0) if lora else None
        policy = Policy(str(folder), adapters, dtype="float64", gradient_checkpointing=checkpointing)
        policy.load()
        policy.train()
        assert policy.base.is_gradient_checkpointing is checkpointing
        change(policy)
        torch.manual_seed(5)
        reward = ClassifierReward.from_classifier(make_classifier())
        method = GradeSTE(policy, reward, sampler=Sampler(max_new_tokens=6), hops=2, beta=0.1, kl_prefix="full")
        torch.manual_seed(6)
        rollout = method.sampler(policy, Prompts.of(make_prompts()))
        method.loss(Experience(rollout, method.reward.pathwise(rollout))).loss.backward()
        found.append({key: p.grad for key, p in policy.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() == {key for key, p in policy.named_parameters() if p.requires_grad}
    for key, gradient in found[0].items():
        torch.testing.assert_close(found[1][key], gradient)
        assert gradient.abs().max() > 0


@pytest.mark.parametrize(("configured", "expected"), [(0, [0]), ([3, 0], [3, 0]), (None, [0])])
def test_end_of_sequence_tokens(configured: Any, expected: list[int]) -> None:
    policy = make_policy()
    policy.base.generation_config.eos_token_id = configured
    assert policy.eos_ids == expected


@every_architecture
def test_context_length(name: str) -> None:
    policy = make_policy(name)
    assert policy.context_length == policy.base.config.max_position_embeddings
