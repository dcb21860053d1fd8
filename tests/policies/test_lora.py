"""Which layers get adapters, and what they do to what is trained and written."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from grade_lightning.errors import InputError
from grade_lightning.policies import LoRA, Policy
from tests.conftest import make_model, make_tokenizer
from tests.policies.making import (
    change,
    every_architecture,
    logits,
    make_policy,
    reference_logits,
    with_and_without_lora,
)


@every_architecture
@with_and_without_lora
def test_what_is_trained(name: str, lora: bool) -> None:
    policy = make_policy(name, lora)
    trained = {key for key, parameter in policy.named_parameters() if parameter.requires_grad}
    if lora:
        assert trained == {key for key, _ in policy.named_parameters() if ".lora_" in key}
        assert policy.reference is None
    else:
        assert trained == {key for key, _ in policy.named_parameters() if key.startswith("model.")}
    reference_logits(policy)  # switching adapters off and on leaves them trainable
    assert {key for key, parameter in policy.named_parameters() if parameter.requires_grad} == trained


@every_architecture
def test_paper_targets_where_the_model_has_them(name: str) -> None:
    adapted = {
        key.split(".lora_")[0].rpartition(".")[2] for key in make_policy(name, True).state_dict() if ".lora_" in key
    }
    own = {"gpt2": {"c_attn"}, "gpt_neox": {"query_key_value"}}
    assert adapted == own.get(name, {"q_proj", "k_proj", "v_proj", "o_proj"})


def test_unknown_targets_are_named() -> None:
    with pytest.raises(InputError, match=r"nothing_like_it.*target_modules"):
        Policy.from_model(make_model(), make_tokenizer(), LoRA(target_modules=["nothing_like_it"]))


@every_architecture
@with_and_without_lora
def test_saved_policy_is_the_policy(name: str, lora: bool, tmp_path: Path) -> None:
    """Adapters are merged in what is written, not in what is trained."""
    policy = make_policy(name, lora)
    change(policy)
    truth, reference = logits(policy), reference_logits(policy)
    state = {key: value.clone() for key, value in policy.state_dict().items()}
    policy.save_pretrained(tmp_path)

    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded = Policy.from_model(plain, make_tokenizer(), reference=False)
    torch.testing.assert_close(logits(loaded), truth, rtol=1e-4, atol=1e-4)
    assert not any("lora" in key or "base_layer" in key for key in plain.state_dict())
    again = Policy(str(tmp_path))
    again.load()
    torch.testing.assert_close(logits(again), truth, rtol=1e-4, atol=1e-4)
    assert again.tokenizer.get_vocab() == policy.tokenizer.get_vocab()

    assert policy.state_dict().keys() == state.keys()
    torch.testing.assert_close(logits(policy), truth)
    torch.testing.assert_close(reference_logits(policy), reference)


@with_and_without_lora
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saving_does_not_touch_a_bit_of_the_policy(dtype: torch.dtype, lora: bool, tmp_path: Path) -> None:
    """W + BA − BA is not W in floating point: an export in mid-training must not move policy and reference."""
    policy = Policy.from_model(make_model("llama", dtype), make_tokenizer(), LoRA(r=2, dropout=0.0) if lora else None)
    change(policy)
    state = {key: value.clone() for key, value in policy.state_dict().items()}
    policy.save_pretrained(tmp_path)
    moved = [key for key, value in policy.state_dict().items() if not torch.equal(value, state[key])]
    assert moved == []
