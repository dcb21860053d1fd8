"""A base of 4 bits under adapters, against the same base in full precision."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from grade_lightning.errors import InputError
from grade_lightning.methods import GradeSTE
from grade_lightning.policies import LoRA, Policy, low_bit
from grade_lightning.rollouts import Sampler
from tests.conftest import make_model, make_prompts, make_tokenizer
from tests.policies.making import change, logits, reference_logits

ADAPTERS = LoRA(r=2, dropout=0.0)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """Weights that 4 bits do not hold exactly."""
    make_model("llama").save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def policy(folder: str) -> Policy:
    pytest.importorskip("bitsandbytes")
    found = Policy(folder, lora=ADAPTERS, load_in_4bit=True)
    found.load()
    change(found)
    return found


def in_full(policy: Policy, folder: str, path: Path) -> Policy:
    """The same values in float32: the base as it is written without adapters, then the adapters."""
    policy.save_pretrained(path / "adapters", merge=False)
    with torch.no_grad():
        kept = {name: p.clone() for name, p in policy.named_parameters() if ".lora_B" in name}
        for name in kept:
            policy.get_parameter(name).zero_()
        policy.save_pretrained(path / "plain")
        for name, value in kept.items():
            policy.get_parameter(name).copy_(value)
    plain = Policy(str(path / "plain"), lora=ADAPTERS)
    plain.load()
    plain.load_state_dict({name: p for name, p in policy.state_dict().items() if ".lora_" in name}, strict=False)
    return plain


def gradients(policy: Policy) -> dict[str, torch.Tensor]:
    prompts = make_prompts()
    policy.zero_grad()
    found = policy(policy.embed(prompts["input_ids"]), prompts["attention_mask"], 3)
    found.log_softmax(-1)[..., 1].sum().backward()
    return {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}


def test_it_computes_what_its_values_in_full_precision_do(policy: Policy, folder: str, tmp_path: Path) -> None:
    """The logits, the reference's, and every adapter's gradient, before and after the policy was sampled."""
    plain = in_full(policy, folder, tmp_path)
    stored = [p for p in policy.parameters() if not p.is_floating_point()]
    assert len(stored) == 7 * policy.base.config.num_hidden_layers
    wanted = gradients(plain)
    assert wanted.keys() == {name for name, p in policy.named_parameters() if p.requires_grad}
    for _ in range(2):
        torch.testing.assert_close(logits(policy), logits(plain), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(reference_logits(policy), reference_logits(plain), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(gradients(policy), wanted, rtol=1e-3, atol=1e-4)
        Sampler(max_new_tokens=2)(policy, policy_prompts())


def policy_prompts() -> Any:
    from grade_lightning.records import Prompts

    prompts = make_prompts()
    return Prompts(prompts["input_ids"], prompts["attention_mask"])


def test_it_is_written_with_its_adapters_as_a_plain_model(policy: Policy, tmp_path: Path) -> None:
    truth, state = logits(policy), {name: value.clone() for name, value in policy.state_dict().items()}
    policy.save_pretrained(tmp_path / "merged")
    assert not hasattr(AutoConfig.from_pretrained(tmp_path / "merged"), "quantization_config")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert all(p.dtype == torch.float32 for p in plain.parameters())
    merged = Policy.from_model(plain, make_tokenizer(), reference=False)
    torch.testing.assert_close(logits(merged), truth, rtol=1e-4, atol=1e-4)

    assert policy.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in policy.state_dict().items())
    assert policy.base.is_quantized
    assert policy.base.config.quantization_config.load_in_4bit


def test_a_checkpoint_holds_the_adapters_alone(folder: str) -> None:
    pytest.importorskip("bitsandbytes")
    module = GradeSTE(policy=Policy(folder, lora=ADAPTERS, load_in_4bit=True))
    module.policy.load()
    assert module.state_dict().keys() == {
        name for name, parameter in module.named_parameters() if parameter.requires_grad
    }


def test_what_has_few_bits_is_not_trained(folder: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"load_in_4bit.*lora\.r 16"):
        Policy(folder, load_in_4bit=True)
    pytest.importorskip("bitsandbytes")
    stored = AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    with pytest.raises(InputError, match=r"few bits and cannot be trained; set --model\.policy\.lora\.r 16"):
        Policy.from_model(stored, make_tokenizer())


def test_it_needs_what_reads_it(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_bit, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(InputError, match=r"load_in_4bit needs bitsandbytes: pip install 'grade-lightning\[bits\]'"):
        Policy(folder, lora=ADAPTERS, load_in_4bit=True).load()
