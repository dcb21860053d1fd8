"""Completions that go through a network behind the keys and values of their prompts, against the whole."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from grade_lightning.policies import ChunkedPass, LoRA, PackedPass, Policy, SharedPrefixPass, WholePass, continuing
from tests.conftest import VOCABULARY, make_model, make_prompts, make_tokenizer, mostly_slow
from tests.policies.making import change, make_policy, with_and_without_lora

LENGTH = 4


def traced(policy: Policy, length: int = LENGTH) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of padded sequences, their hidden states, and the inputs at which a hop takes its gradient."""
    batch = make_prompts((7, 5, 6))
    inputs = policy.embed(batch["input_ids"])
    inputs = inputs if inputs.requires_grad else inputs.requires_grad_()
    hidden, tokens = policy.training_pass.hidden_for_hops(policy, inputs, batch["attention_mask"], length)
    return inputs, hidden, tokens


def figures(policy: Policy) -> list[Tensor]:
    """Hidden states, the gradient at the completion's inputs, and those of the weights."""
    _, hidden, tokens = traced(policy)
    weights = torch.linspace(-1, 2, hidden.numel(), dtype=hidden.dtype).view(hidden.shape)
    trained = [p for name, p in policy.named_parameters() if p.requires_grad and "lm_head" not in name]
    (gradient,) = torch.autograd.grad(hidden, tokens, weights, retain_graph=True)
    own = torch.autograd.grad(hidden, trained, weights, allow_unused=True)
    return [hidden, gradient[:, -(LENGTH - 1) :], *(g for g in own if g is not None)]


@with_and_without_lora
@pytest.mark.parametrize("name", mostly_slow(["gpt2", "llama", "qwen3", "gpt_neox"], "gpt2", "llama"))
def test_states_and_gradients_are_those_of_the_whole(name: str, lora: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of hidden states, of inputs and of all weights, with prompts padded on the left."""
    adapters = LoRA(r=2, dropout=0.0) if lora else None
    policy = Policy.from_model(make_model(name, torch.float64), make_tokenizer(), adapters)
    change(policy)
    assert traced(policy)[2].shape[1] == LENGTH - 1
    parts = figures(policy)
    monkeypatch.setattr(WholePass, "prompt_first", False)
    whole = figures(policy)
    assert len(parts) == len(whole) > 5
    for one, two in zip(parts, whole, strict=True):
        assert float((one - two).norm()) < (1e-12 if name == "gpt2" else 1e-5) * float(two.norm())


def test_a_hop_does_not_go_through_the_prompt() -> None:
    """As many positions come out of the backward pass of a layer as there are tokens of the completion."""
    policy, seen = make_policy("llama"), list[int]()
    policy.base.model.layers[0].register_full_backward_hook(lambda layer, into, out: seen.append(out[0].shape[1]))
    _, hidden, tokens = traced(policy)
    torch.autograd.grad(hidden, tokens, torch.ones_like(hidden), retain_graph=True)
    assert seen == [LENGTH - 1]
    hidden.sum().backward()
    assert sorted(seen[1:]) == [LENGTH - 1, 7 - (LENGTH - 1)]


def test_a_single_token_has_no_inputs_of_its_own() -> None:
    inputs, hidden, tokens = traced(make_policy(), length=1)
    assert tokens is inputs
    assert hidden.shape[1] == 1


@pytest.mark.parametrize(
    ("training_pass", "alone"),
    [(WholePass(), True), (SharedPrefixPass(), True), (PackedPass(), False), (ChunkedPass(), False)],
    ids=lambda x: type(x).__name__ if not isinstance(x, bool) else "",
)
def test_passes_that_arrange_sequences_themselves_keep_the_whole(training_pass: Any, alone: bool) -> None:
    policy = Policy.from_model(make_model(), make_tokenizer(), training_pass=training_pass)
    inputs, _, tokens = traced(policy)
    assert (tokens is not inputs) == alone


def test_where_it_cannot_be_it_is_the_whole() -> None:
    """Sliding windows, recomputed activations, a compiled body."""
    assert not make_policy("gemma3").anatomy.continues
    policy = make_policy()
    assert policy.anatomy.continues
    policy.torch_compile = True
    assert not continuing.can_continue(policy)
    policy.torch_compile = False
    policy.base.gradient_checkpointing_enable()
    policy.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # transformers warns as it drops the keys and values
        inputs, _, tokens = traced(policy)
    assert tokens is inputs


def test_a_fresh_model_is_not_taken_for_another() -> None:
    """The last norm lets nothing pass along its own output: of a gradient in that direction only rounding is left."""
    sizes: dict[str, Any] = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=VOCABULARY, num_attention_heads=9, num_key_value_heads=3, **sizes)
    torch.manual_seed(0)
    assert Policy.from_model(LlamaForCausalLM(config), make_tokenizer(), reference=False).anatomy.continues


@pytest.mark.parametrize("broken", ["states", "gradients"])
def test_a_model_that_does_not_give_the_same_is_found_by_trying(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that forgets its prompt, and one through whose keys and values no gradient comes back."""
    plain = continuing.continuation

    def worse(*args: Any) -> Any:
        call = plain(*args)

        def without(inputs: Tensor, cache: Any, first: int) -> Tensor:
            for layer in cache.layers:
                layer.keys, layer.values = (
                    part.detach() if broken == "gradients" else 0 * part for part in (layer.keys, layer.values)
                )
            return call(inputs, cache, first)

        return without

    monkeypatch.setattr(continuing, "continuation", worse)
    assert not make_policy().anatomy.continues
