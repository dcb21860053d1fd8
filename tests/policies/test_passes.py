"""Completions that share their prompt against each sequence by itself: hidden states, statistics, gradients."""

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grade_lightning.functional.packing import completions_per_row
from grade_lightning.modules.measuring import measure
from grade_lightning.policies import LoRA, Pass, Policy, SharedPrefixPass, WholePass, passes, sharing
from grade_lightning.records import Rollout
from grade_lightning.rollouts import Distribution
from tests.conftest import VOCABULARY, make_model, make_tokenizer

Shapes = list[tuple[int, ...]]
three_models = pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3"])
EXACT = 1e-10


def rollout(labels: tuple[int, ...] = (3, 0, 3, 2, 0, 3, 4)) -> Rollout:
    """Completions of 1 to 6 tokens to prompts of 1 to 5, by default in groups of 3, 2, 1 and 1, in no order."""
    generator = torch.Generator().manual_seed(2)
    p, lengths = 6, torch.tensor([4, 1, 6, 3, 2, 5, 1])[: len(labels)]
    groups, widths = torch.tensor(labels), torch.tensor([4, 3, 2, 5, 1])
    prompts = torch.randint(2, VOCABULARY, (5, p), generator=generator)[groups]
    prompt_mask = torch.arange(p) >= p - widths[groups].unsqueeze(1)
    ids = torch.randint(2, VOCABULARY, (len(labels), 6), generator=generator)
    mask = torch.arange(6) < lengths.unsqueeze(1)
    return Rollout(
        prompt_ids=prompts.where(prompt_mask, 1),
        prompt_mask=prompt_mask.long(),
        completion_ids=ids.where(mask, 1),
        completion_mask=mask,
        engine_logps=None,
        tokenizer=make_tokenizer(),
        groups=groups,
    )


class Norm(nn.Module):
    """The root-mean-square norm in the precision of its input; that of transformers is in single precision."""

    def __init__(self, weight: nn.Parameter, epsilon: float) -> None:
        super().__init__()
        self.weight, self.epsilon = weight, epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.epsilon).rsqrt()


def in_double(model: Any) -> Any:
    """With norms of double precision all the way."""
    for parent in list(model.modules()):
        for name, part in list(parent.named_children()):
            if hasattr(part, "variance_epsilon"):
                setattr(parent, name, Norm(part.weight, part.variance_epsilon))
    return model


def make(name: str, training_pass: Pass, lora: bool = False, attention: str = "sdpa") -> Policy:
    """A policy in double precision, away from its reference."""
    model = in_double(make_model(name, torch.float64))
    model.set_attn_implementation(attention)
    adapters = LoRA(r=2, dropout=0.0) if lora else None
    torch.manual_seed(0)
    policy = Policy.from_model(model, make_tokenizer(), adapters, training_pass=training_pass).train()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return policy


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> Shapes:
    """Shapes of the packed rows that go through a network."""
    found: Shapes = []

    def watched(network: Any, ids: Tensor, packing: Any) -> Tensor:
        found.append(tuple(packing.source.shape))
        return sharing.packed_hidden(network, ids, packing)

    monkeypatch.setattr(passes, "packed_hidden", watched)
    return found


def figures(policy: Policy, seen: Rollout) -> dict[str, Tensor]:
    """Hidden states, statistics and the gradient of each trained parameter, by name."""
    hidden = policy.training_pass.hidden(policy, seen)[seen.completion_mask]
    stats = measure(policy, Distribution(), seen, graphs="kl")
    policy.zero_grad()
    weights = torch.linspace(-1, 2, seen.sampled.numel()).view(seen.sampled.shape)
    (weights * (stats.logps + stats.entropy.square() + stats.kl)).sum().backward()
    gradients = {name: p.grad for name, p in policy.named_parameters() if p.requires_grad and p.grad is not None}
    assert len(gradients) == sum(p.requires_grad for p in policy.parameters())
    named = {name: getattr(stats, name) for name in ("logps", "entropy", "kl", "ref_logps")}
    return {"hidden": hidden, **named, **gradients}


def assert_the_same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert float(value.abs().max()) > 1e-3, name
        assert float((value - two[name]).abs().max()) < EXACT, name


@three_models
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_shared_prompt_changes_nothing(name: str, lora: bool, packed: Shapes) -> None:
    """Ragged prompts and completions, groups of 3, 2, 1 and 1, of the policy and its reference."""
    seen = rollout()
    whole = figures(make(name, WholePass(), lora), seen)
    assert packed == []
    assert_the_same(whole, figures(make(name, SharedPrefixPass(), lora), seen))
    assert set(packed) == {(4, 17)}  # the longest row: 5 of the prompt, 3 + 5 + 4 of the completions


def test_a_mask_that_is_added_is_the_same(packed: Shapes) -> None:
    """GPT-2's alone: the eager softmax of the others is in single precision."""
    whole, shared = (make("gpt2", one, attention="eager") for one in (WholePass(), SharedPrefixPass()))
    assert_the_same(figures(whole, rollout()), figures(shared, rollout()))
    assert len(packed) == 3


@pytest.mark.parametrize("labels", [(0,) * 7, (0, 0), (4, 1, 1, 1, 2, 2, 2)], ids=str)
def test_groups_of_all_sizes(labels: tuple[int, ...], packed: Shapes) -> None:
    seen = rollout(labels)
    assert_the_same(figures(make("llama", WholePass()), seen), figures(make("llama", SharedPrefixPass()), seen))
    assert len(packed) == 3


def test_a_large_group_has_several_copies_of_its_prompt(packed: Shapes) -> None:
    """Four completions behind the first, three behind the second: 4 + 3 + 5 + 2 tokens, and 4 + 1 + 4."""
    assert completions_per_row(p=24, t=18, most=7, width=16) == 4
    assert completions_per_row(p=24, t=12, most=7, width=16) == 7
    seen = rollout((0,) * 7)
    wider = {"prompt_ids": (18, 0), "prompt_mask": (18, 0), "completion_ids": (0, 12), "completion_mask": (0, 12)}
    padded: dict[str, Any] = {name: nn.functional.pad(getattr(seen, name), more) for name, more in wider.items()}
    figures(make("gpt2", SharedPrefixPass()), replace(seen, **padded, sampled=padded["completion_mask"]))
    assert set(packed) == {(2, 14)}


def test_completions_go_alone_behind_a_short_prompt(packed: Shapes) -> None:
    seen = rollout()
    ids, mask = (
        nn.functional.pad(x, (0, 40), value=value)
        for x, value in ((seen.completion_ids, 1), (seen.completion_mask, False))
    )
    seen = replace(seen, completion_ids=ids, completion_mask=mask, sampled=mask)
    figures(make("gpt2", SharedPrefixPass()), seen)
    assert packed == []


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_gradient_checkpointing_changes_nothing(lora: bool, packed: Shapes) -> None:
    seen, policy = rollout(), make("qwen3", SharedPrefixPass(), lora)
    policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert policy.base.is_gradient_checkpointing
    assert_the_same(figures(make("qwen3", WholePass(), lora), seen), figures(policy, seen))
    assert len(packed) == 3


def test_what_is_not_sampled_is_attended_to(packed: Shapes) -> None:
    """The answer of a tool."""
    seen = rollout()
    seen = replace(seen, sampled=seen.completion_mask & (torch.arange(6) != 2))
    assert_the_same(figures(make("gpt2", WholePass()), seen), figures(make("gpt2", SharedPrefixPass()), seen))
    assert len(packed) == 3


def test_prompts_that_are_not_shared_go_through_whole(packed: Shapes) -> None:
    policy, seen = make("gpt2", SharedPrefixPass()), rollout((3, 0, 2, 1))
    assert torch.equal(policy.training_pass.hidden(policy, seen), WholePass().hidden(policy, seen))
    assert packed == []


def test_a_pass_that_comes_too_late_is_named() -> None:
    policy = make("gpt2", WholePass())
    policy.training_pass = SharedPrefixPass()
    with pytest.raises(RuntimeError, match=r"before Policy.load\(\)"):
        measure(policy, Distribution(), rollout())


# ---- where it cannot be done


def test_what_cannot_share_says_so_and_goes_through_whole(packed: Shapes) -> None:
    """Layers with a sliding window of 8."""
    with pytest.warns(UserWarning, match=r"Gemma3ForCausalLM cannot share prompts .* sliding window or a state"):
        policy = make("gemma3", SharedPrefixPass())
    assert_the_same(figures(make("gemma3", WholePass()), rollout()), figures(policy, rollout()))
    assert packed == []
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*cannot share")
        make("gemma3", WholePass())
        make("llama", SharedPrefixPass())


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_prompts_are_not_shared_while_dropout_is_on(name: str, packed: Shapes) -> None:
    """One has a module for it, the other keeps a number. In evaluation it is off."""
    policy = make(name, SharedPrefixPass())
    parts: list[Any] = list(policy.base.modules())
    for module in parts:
        if isinstance(module, nn.Dropout):
            module.p = 0.1
        elif hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    with pytest.warns(UserWarning, match="not shared in the training pass while dropout is on"):
        policy.training_pass.hidden(policy, rollout())
    assert packed == []
    with policy.evaluating():
        policy.training_pass.hidden(policy, rollout())
    assert len(packed) == 1
