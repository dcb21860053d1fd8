"""A rollout, rewards of it, and their gradients by brute force."""

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from grade_lightning.records import Rollout, Scores
from grade_lightning.rewards import Classifier, DifferentiableReward, FunctionReward
from tests.conftest import VOCABULARY, make_model, make_prompts, make_tokenizer


def make_classifier(name: str = "gpt2", dtype: torch.dtype = torch.float64, seed: int = 3) -> Classifier:
    backbone: Any = make_model(name, dtype).base_model
    torch.manual_seed(seed)
    classifier = Classifier(backbone, hidden=8).to(dtype)
    with torch.no_grad():
        for parameter in classifier.head.parameters():
            parameter.mul_(3)
    return classifier


def make_rollout(**columns: list[Any]) -> Rollout:
    """Three completions of 4, 2 and 1 tokens after prompts padded on the left."""
    prompts = make_prompts()
    return Rollout(
        prompt_ids=prompts["input_ids"],
        prompt_mask=prompts["attention_mask"],
        completion_ids=torch.tensor([[4, 5, 6, 7], [8, 0, 1, 1], [0, 1, 1, 1]]),
        completion_mask=torch.arange(4) < torch.tensor([[4], [2], [1]]),
        engine_logps=torch.zeros(3, 4),
        tokenizer=make_tokenizer(),
        columns=columns,
        eos_ids=[0],
    )


def one_hot_gradient(reward: DifferentiableReward, rollout: Rollout) -> Tensor:
    """∂ Σ reward / ∂ one-hot completion tokens, with the whole sequence as one-hot @ table."""
    one_hot = torch.nn.functional.one_hot(rollout.ids, VOCABULARY).to(reward.table().dtype).requires_grad_()
    total = reward.score_embeddings(one_hot @ reward.table(), rollout.mask).sum()
    (gradient,) = torch.autograd.grad(total, one_hot)
    return gradient[:, rollout.prompt_ids.shape[1] :]


def adjoint(scores: Scores) -> Tensor:
    return torch.stack([part() for part in scores.adjoints]).sum(0)


def constant(*values: float | None, name: str = "rule") -> FunctionReward:
    def rule(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        return list(values)

    rule.__name__ = name
    return FunctionReward(rule)


NAMES = ["<eos>", "<pad>", *(f"w{i}" for i in range(2, VOCABULARY))]


def words_in(order: list[int]) -> PreTrainedTokenizerFast:
    """The same words in another order, of which the first two stay."""
    words = {NAMES[i]: place for place, i in enumerate(order)}
    inner = Tokenizer(models.WordLevel(words, unk_token="w2"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>")
