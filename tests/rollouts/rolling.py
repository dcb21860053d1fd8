"""Rollouts of tiny models, and the same tokens through transformers alone."""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from grade_lightning.policies import LoRA, Policy
from grade_lightning.records import Prompts, Rollout
from grade_lightning.rollouts import Distribution, Sampler, TransformersEngine
from tests.conftest import make_model, make_prompts, make_tokenizer

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top-k": {"top_k": 4},
    "top-p": {"top_p": 0.8},
    "minimum": {"min_new_tokens": 4},
    "all": {"temperature": 1.5, "top_k": 9, "top_p": 0.9, "min_new_tokens": 3},
    "blocks": {"block": 3, "min_new_tokens": 2},
    "static cache": {"static_cache": True},
    "weights in another layout": {"max_new_tokens": 20},
    "as they are": {"max_new_tokens": 20, "prepack": False},
}


def make_policy(name: str = "gpt2", lora: bool = False) -> Policy:
    return Policy.from_model(make_model(name), make_tokenizer(), LoRA(r=2, dropout=0.0) if lora else None)


def make_sampler(**settings: Any) -> Sampler:
    """Settings of the sampler and of its engine together."""
    engine = {name: settings.pop(name) for name in ("block", "static_cache", "bfloat16", "prepack") if name in settings}
    return Sampler(**{"max_new_tokens": 8} | settings, engine=TransformersEngine(**engine))


def roll(policy: Policy, seed: int = 0, repeat: int = 4, **settings: Any) -> Rollout:
    torch.manual_seed(seed)
    prompts = {name: value.repeat(repeat, 1) for name, value in make_prompts().items()}
    return make_sampler(**settings)(policy, Prompts.of(prompts))


def logps_of(rollout: Rollout) -> Tensor:
    assert rollout.engine_logps is not None
    return rollout.engine_logps


def teacher_forced(rollout: Rollout, name: str, distribution: Distribution) -> Tensor:
    """Each row by itself, without padding, through the plain model and the processors of transformers."""
    plain = make_model(name).eval()
    result = torch.zeros_like(logps_of(rollout))
    for row in range(len(result)):
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row].bool()]
        completion = rollout.completion_ids[row][rollout.completion_mask[row]]
        processors = LogitsProcessorList([TemperatureLogitsWarper(distribution.temperature)])
        if distribution.min_new_tokens:
            processors.append(
                MinNewTokensLengthLogitsProcessor(len(prompt), distribution.min_new_tokens, rollout.eos_ids)
            )
        if distribution.top_k:
            processors.append(TopKLogitsWarper(distribution.top_k))
        if distribution.top_p < 1:
            processors.append(TopPLogitsWarper(distribution.top_p))
        ids: Any = torch.cat([prompt, completion]).unsqueeze(0)
        with torch.no_grad():
            logits = plain(input_ids=ids).logits[0].float()
        for t, token in enumerate(completion):
            end = len(prompt) + t
            scores = processors(ids[:, :end], logits[end - 1 : end].clone())
            result[row, t] = scores.log_softmax(-1)[0, token]
    return result


def assert_mixed(rollout: Rollout) -> None:
    assert rollout.ended.any()
    assert not rollout.ended.all()
    assert not rollout.prompt_mask.all()
