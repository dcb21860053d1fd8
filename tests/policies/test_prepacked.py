"""Weights in oneDNN's layout: the products are those of the layers, and the layers stay as they are."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from grade_lightning.policies import LoRA, Policy, RowSampling
from grade_lightning.policies.prepacked import can_prepack, prepacked
from tests.conftest import make_model, make_tokenizer
from tests.policies.making import change

packs = pytest.mark.skipif(not can_prepack(), reason="only for oneDNN on x86")


def computing(model: nn.Module) -> list[str]:
    """Layers that compute in another way."""
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


def logits(policy: Policy) -> Tensor:
    ids = torch.arange(2, 14).reshape(2, 6)
    with torch.no_grad():
        found: Tensor = policy.model(input_ids=ids).logits
    return found


@packs
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_the_product_is_the_layers(kind: Any, bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(5, 7, bias=bias) if kind is nn.Linear else Conv1D(7, 5)
    nn.init.normal_(layer.bias) if bias or kind is Conv1D else None
    rows = torch.randn(4, 6, 10)[:, 1:3, ::2]  # not contiguous
    plain = layer(rows.contiguous())
    with prepacked(layer):
        assert computing(layer) == [""]
        torch.testing.assert_close(layer(rows), plain.detach())
        assert layer(rows[:0]).shape == (0, 2, 7)
    assert computing(layer) == []
    assert layer(rows.contiguous()).requires_grad


@packs
@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_policy_is_the_same_and_stays_so(name: str, lora: bool) -> None:
    """Adapters, which are a Conv1D's in GPT-2, are in the copies."""
    policy = Policy.from_model(make_model(name), make_tokenizer(), LoRA(r=2, dropout=0.0) if lora else None)
    change(policy)
    state = {key: value.clone() for key, value in policy.state_dict().items()}
    with policy.evaluating():
        truth = logits(policy)
        with prepacked(policy.model):
            assert any(name.endswith("lm_head") for name in computing(policy.model))
            assert not any(".lora_" in name for name in computing(policy.model))
            torch.testing.assert_close(logits(policy), truth, rtol=1e-4, atol=1e-5)
        assert computing(policy.model) == []
        assert torch.equal(logits(policy), truth)
    assert all(torch.equal(value, state[key]) for key, value in policy.state_dict().items())


@packs
def test_adapters_that_are_switched_off_are_not_there() -> None:
    policy = Policy.from_model(make_model("llama"), make_tokenizer(), LoRA(r=2, dropout=0.0))
    change(policy)
    with policy.as_reference():
        truth = logits(policy)
        with prepacked(policy.model):
            torch.testing.assert_close(logits(policy), truth, rtol=1e-4, atol=1e-5)


@packs
def test_in_bfloat16_adapters_stay_beside_the_weights() -> None:
    """Added to a weight of eight bits, a small adapter would be rounded away."""
    policy = Policy.from_model(make_model("llama", torch.bfloat16), make_tokenizer(), LoRA(r=2, dropout=0.0))
    change(policy)
    truth = logits(policy)
    with prepacked(policy.model):
        assert not any(name.endswith("q_proj") for name in computing(policy.model))
        torch.testing.assert_close(logits(policy), truth, rtol=0.05, atol=0.05)


@packs
def test_under_autocast_the_copies_have_its_type() -> None:
    policy = Policy.from_model(make_model("llama"), make_tokenizer())
    with torch.autocast("cpu", torch.bfloat16):
        truth = logits(policy)
        with prepacked(policy.model):
            found = logits(policy)
    assert found.dtype == truth.dtype == torch.bfloat16
    torch.testing.assert_close(found, truth, rtol=0.05, atol=0.05)


@packs
def test_adapters_with_a_bias_stay_beside_the_weights() -> None:
    """The product of their matrices would be without it."""
    peft = pytest.importorskip("peft")
    model = make_model("llama")
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True), model)
    policy = Policy.from_model(model, make_tokenizer(), reference=False)
    change(policy)
    truth = logits(policy)
    with prepacked(policy.model):
        assert not any(name.endswith("q_proj") for name in computing(policy.model))
        torch.testing.assert_close(logits(policy), truth, rtol=1e-4, atol=1e-5)


@packs
def test_layers_whose_rows_are_sampled_in_training_are_packed_too() -> None:
    policy = Policy.from_model(make_model("llama"), make_tokenizer(), row_sampling=RowSampling())
    with prepacked(policy.model):
        assert any(name.endswith("q_proj") for name in computing(policy.model))


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(3, 2, dtype=torch.float64), nn.Linear(3, 2, device="meta"), type("Own", (nn.Linear,), {})(3, 2)],
    ids=["float64", "another device", "another class"],
)
def test_what_it_does_not_know_computes_as_ever(layer: nn.Linear) -> None:
    with prepacked(layer):
        assert computing(layer) == []


def test_float64_stays_under_autocast() -> None:
    layer = nn.Linear(3, 2, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16), prepacked(layer):
        assert layer(torch.ones(1, 3, dtype=torch.float64)).dtype == torch.float64


def test_the_input_may_be_named() -> None:
    layer, row = nn.Linear(3, 2), torch.ones(1, 3)
    with prepacked(layer):
        assert torch.equal(layer(input=row), layer(row))


def test_a_layer_that_somebody_has_changed_keeps_the_change() -> None:
    layer = nn.Linear(3, 2)
    vars(layer)["forward"] = lambda inputs: inputs + 1
    with prepacked(layer):
        assert layer(torch.zeros(1)) == 1
    assert layer(torch.zeros(1)) == 1


def test_layers_come_back_after_an_error() -> None:
    layer = nn.Linear(3, 2)
    with pytest.raises(ZeroDivisionError), prepacked(layer):
        _ = 1 / 0
    assert computing(layer) == []
