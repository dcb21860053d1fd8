"""What is said of a model before its completions share a prompt."""

from typing import Any

import pytest
import torch
from transformers import GPTNeoConfig, GPTNeoForCausalLM

from grade_lightning.policies import Policy, WholePass, sharing
from tests.conftest import VOCABULARY, make_tokenizer
from tests.policies.test_passes import make


def test_only_masks_are_trusted() -> None:
    policy = make("gpt2", WholePass())
    policy.base.config._attn_implementation = "flash_attention_2"
    assert sharing.obstacle(policy) == "flash_attention_2 attention takes no mask of its own"
    config = GPTNeoConfig(
        hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]], window_size=8,
        vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    local = Policy.from_model(GPTNeoForCausalLM(config), make_tokenizer())
    assert sharing.obstacle(local) == "its attention is not that of transformers' interface"


def test_a_model_that_passes_over_the_positions_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says nothing of itself that forbids it; a few tokens do."""
    policy = make("gpt2", WholePass())
    body: Any = policy.base.base_model
    forward = body.forward

    def own_positions(**kwargs: Any) -> Any:
        given, mask = kwargs["position_ids"], kwargs["attention_mask"]
        return forward(**kwargs | {"position_ids": given if mask.dim() == 2 else torch.arange(given.shape[1])[None]})

    def refuses(**kwargs: Any) -> Any:
        if kwargs["attention_mask"].dim() > 2:
            raise ValueError("masks of two\ndimensions alone")
        return forward(**kwargs)

    assert sharing.obstacle(policy) == ""
    monkeypatch.setattr(body, "forward", own_positions)
    assert "its hidden states differ by" in sharing.obstacle(policy)
    monkeypatch.setattr(body, "forward", refuses)
    assert sharing.obstacle(policy) == "ValueError: masks of two dimensions alone"
