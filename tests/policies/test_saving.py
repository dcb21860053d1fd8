import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from grade_lightning.policies import LoRA, Policy
from tests.conftest import make_model, make_prompts, make_tokenizer

TARGETS = [["q_proj"], ["lm_head"], ["embed_tokens"], ["q_proj", "lm_head"]]


@pytest.mark.parametrize("targets", TARGETS, ids="-".join)
@pytest.mark.parametrize("tied", [True, False])
def test_the_tie_is_true_where_the_matrices_are_equal(targets: list[str], tied: bool, tmp_path: Path) -> None:
    model = make_model("qwen3" if tied else "llama")
    assert model.config.tie_word_embeddings is tied
    policy = Policy.from_model(model, make_tokenizer(), LoRA(r=2, dropout=0.0, target_modules=targets))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)
    batch = make_prompts()
    with policy.evaluating() as network, torch.no_grad():
        expected = network(**batch).logits
    policy.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(**batch).logits, expected, rtol=1e-4, atol=1e-4)
    ends = [again.get_input_embeddings().weight, again.get_output_embeddings().weight]
    assert AutoConfig.from_pretrained(tmp_path).tie_word_embeddings is torch.equal(*ends)
    assert torch.equal(*ends) is (tied and targets == ["q_proj"])
    assert policy.base.config.tie_word_embeddings is tied  # in memory it is as before


@pytest.mark.parametrize("merge", [True, False])
def test_generation_settings_hold_all_end_tokens(merge: bool, tmp_path: Path) -> None:
    model: Any = make_model("llama")
    model.generation_config = GenerationConfig(eos_token_id=5, max_length=7)
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["w6"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} w6 {% endfor %}"
    policy = Policy.from_model(model, tokenizer, LoRA(r=2) if not merge else None)
    assert policy.eos_ids == [5, 0, 6]
    policy.save_pretrained(tmp_path, merge=merge)
    written = json.loads((tmp_path / "generation_config.json").read_text())
    assert (written["eos_token_id"], written["max_length"]) == ([5, 0, 6], 7)
    assert model.generation_config.eos_token_id == 5


def test_ends_that_were_set(tmp_path: Path) -> None:
    policy = Policy.from_model(make_model(), make_tokenizer())
    policy.eos_ids = [3]
    assert policy.eos_ids == [3]
    policy.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == 3
