"""What the tests share: tiny random models, a tiny tokenizer, real data where it is at hand."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers and their processes stand side by side

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

VOCABULARY = 19
SHARED = Path(__file__).resolve().parents[2] / "shared"

_SIZES: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 24}
_HEADS: dict[str, Any] = {"num_key_value_heads": 1, "head_dim": 8}
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "gpt2": lambda: GPT2Config(
        n_embd=16, n_head=2, n_layer=2, n_positions=64, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0
    ),
    "llama": lambda: LlamaConfig(vocab_size=VOCABULARY, **_SIZES, num_key_value_heads=1, tie_word_embeddings=False),
    "qwen3": lambda: Qwen3Config(vocab_size=VOCABULARY, **_SIZES, **_HEADS, tie_word_embeddings=True),
    "gemma3": lambda: Gemma3TextConfig(
        vocab_size=VOCABULARY, **_SIZES, **_HEADS, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    ),
    "gpt_neox": lambda: GPTNeoXConfig(
        vocab_size=VOCABULARY, **_SIZES, max_position_embeddings=64, tie_word_embeddings=False
    ),
}


def mostly_slow(values: Iterable[Any], *ordinary: Any) -> list[Any]:
    """The values of a parameter; all but the ordinary ones are in the slow set."""
    return [value if value in ordinary else pytest.param(value, marks=pytest.mark.slow) for value in values]


def make_model(name: str = "gpt2", dtype: torch.dtype = torch.float32, scale: float = 8.0) -> PreTrainedModel:
    """A tiny random model without dropout; its weights are large enough that tokens matter to each other."""
    torch.manual_seed(0)
    config = CONFIGS[name]()
    for key in config.to_dict():
        if key.endswith("pdrop") or "dropout" in key:
            setattr(config, key, 0.0)
    config.bos_token_id = config.eos_token_id = 0
    config.pad_token_id = 1
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    cast(torch.nn.Module, model).to(dtype)
    return model


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One word for each id: `<eos>`, `<pad>`, then w2, w3 and so on."""
    words = ["<eos>", "<pad>", *(f"w{i}" for i in range(2, VOCABULARY))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w2"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<eos>", bos_token="<eos>", pad_token="<pad>", padding_side="left"
    )


def make_prompts(lengths: tuple[int, ...] = (5, 3, 4)) -> dict[str, Any]:
    """Random prompts of these lengths, padded on the left."""
    generator = torch.Generator().manual_seed(1)
    width = max(lengths)
    ids = torch.randint(2, VOCABULARY, (len(lengths), width), generator=generator)
    mask = (torch.arange(width) >= width - torch.tensor(lengths).unsqueeze(1)).long()
    return {"input_ids": ids.where(mask.bool(), 1), "attention_mask": mask}


@pytest.fixture
def own_random_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The same noise for each test, and none of it for others."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # `seed_everything` sets it; undone after each test
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip("needs the real data and models beside the checkout")
    return SHARED
