"""Tiny policies, and what they and their references say of the same prompts."""

import pytest
import torch
from torch import Tensor

from grade_lightning.policies import LoRA, Policy
from tests.conftest import CONFIGS, make_model, make_prompts, make_tokenizer

every_architecture = pytest.mark.parametrize("name", CONFIGS)
with_and_without_lora = pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])


def make_policy(name: str = "gpt2", lora: bool = False) -> Policy:
    return Policy.from_model(make_model(name), make_tokenizer(), LoRA(r=2, dropout=0.0) if lora else None)


def change(policy: Policy) -> None:
    """Move everything that is trained, B matrices of adapters included."""
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))


def logits(policy: Policy, length: int = 3) -> Tensor:
    prompts = make_prompts()
    with torch.no_grad():
        return policy(policy.embed(prompts["input_ids"]), prompts["attention_mask"], length)  # type: ignore[no-any-return]


def reference_logits(policy: Policy, length: int = 3) -> Tensor:
    prompts = make_prompts()
    with torch.no_grad():
        return policy.frozen.logits(policy.frozen.embed(prompts["input_ids"]), prompts["attention_mask"], length)
