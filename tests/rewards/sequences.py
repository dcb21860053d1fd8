"""Tiny random sequence classifiers in folders, and what transformers' own pipeline says of texts."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast, pipeline

from grade_lightning.records import Rollout
from tests.conftest import VOCABULARY
from tests.policies.tiny import tiny_config

KINDS = ["gpt2", "llama", "qwen3", "gemma", "gemma3_text", "bert", "deberta", "deberta-v2", "roberta"]
WORDS = ["<eos>", "<pad>", *(f"w{i}" for i in range(2, VOCABULARY))]
CHAT = (
    "{% for m in messages %}w2 {{ 'w3' if m['role'] == 'user' else 'w4' }} {{ m['content'] }} <eos> w5 {% endfor %}"
    "{% if add_generation_prompt %}w2 w4 {% endif %}"
)


def words(*extra: str, framed: bool = False, padding_side: str = "left") -> PreTrainedTokenizerFast:
    """The words of the policy, and further ones; with `[CLS]` and `[SEP]` around a text if it is framed."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*WORDS, *extra])}, unk_token="w2"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special: dict[str, Any] = {"bos_token": "<eos>", "eos_token": "<eos>"}
    if framed:
        ends = [(word, inner.token_to_id(word)) for word in ("[CLS]", "[SEP]")]
        inner.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
        special = {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        padding_side=padding_side,
        model_input_names=["input_ids", "attention_mask"],
        **special,
    )


def write_classifier(
    folder: Path, kind: str, tokenizer: PreTrainedTokenizerFast, dtype: torch.dtype = torch.float32, **settings: Any
) -> Path:
    """A random classifier in which tokens matter to each other."""
    config = tiny_config(kind, **{"num_labels": 1, "pad_token_id": 1} | settings)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model: Any = AutoModelForSequenceClassification.from_config(config)
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def said_by_pipeline(folder: Path, texts: list[str], function: str = "none", label: int = 0, **kwargs: Any) -> Tensor:
    """What the pipeline says of each text, all in one batch."""
    classify: Any = pipeline("text-classification", model=str(folder), device="cpu")
    found = classify(texts, function_to_apply=function, top_k=None, **kwargs)
    name = classify.model.config.id2label[label]
    return torch.tensor([next(each["score"] for each in row if each["label"] == name) for row in found])


def text_of(rollout: Rollout) -> list[str]:
    """Each text with the special tokens in it, padding left out."""
    rows = [ids[keep.bool()] for ids, keep in zip(rollout.ids, rollout.mask, strict=True)]
    return rollout.tokenizer.batch_decode(rows)
