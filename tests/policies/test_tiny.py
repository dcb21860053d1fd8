"""Every class that transformers maps to causal language models, tiny."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import CONFIG_MAPPING

from tests.policies.tiny import NOT_TINY, ORDINARY, VOCABULARY, cases, causal_types, tiny_config, tiny_model

CASES = cases()
A_FEW = ["gpt2", "llama", "opt", "roberta[is_decoder=True]", "lfm2", "mixtral", "qwen3_next", "gemma3"]


def tokens(length: int = 12) -> Tensor:
    """Ordinary tokens of which no two are the same; (1, length)."""
    order = torch.randperm(len(ORDINARY), generator=torch.Generator().manual_seed(0))
    return torch.tensor(ORDINARY)[order[:length]].unsqueeze(0)


def check_that_it_speaks(name: str) -> None:
    """Its logits are numbers of a usual size that depend on place and past; nothing is random, in training too."""
    model_type, overrides = CASES[name]
    model, ids = tiny_model(model_type, **overrides), tokens()
    with torch.no_grad():
        logits, other = (model(input_ids=each).logits.squeeze(0) for each in (ids, ids.flip(1)))
        training = model.train()(input_ids=ids).logits.squeeze(0)
    assert logits.shape == (ids.shape[1], VOCABULARY)
    assert logits.isfinite().all()
    spread = logits.std(-1)
    assert spread.min() > 0.1
    assert spread.max() < 20
    assert ((logits[1:] - logits[:-1]).abs().amax(-1) > 0.05 * spread[1:]).all()
    assert ((logits - other.flip(0)).abs().amax(-1) > 1e-4 * spread).all()
    torch.testing.assert_close(training, logits, rtol=1e-4, atol=1e-4)
    assert sum(parameter.numel() for parameter in model.parameters()) < 300_000
    assert all(parameter.any() for parameter in model.parameters())


@pytest.mark.parametrize("name", A_FEW)
def test_a_few_tiny_models(name: str) -> None:
    check_that_it_speaks(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name not in A_FEW])
def test_every_tiny_model(name: str) -> None:
    check_that_it_speaks(name)


def test_every_kind_of_layer_is_there() -> None:
    kinds = ("layer_types", "layers_block_type", "mlp_layer_types", "attention_layers", "attn_layers", "block_types")
    for model_type in sorted({model_type for model_type, _ in CASES.values()}):
        large, tiny = CONFIG_MAPPING[model_type]().get_text_config(), tiny_config(model_type).get_text_config()
        assert getattr(tiny, "num_hidden_layers", 2) <= 8, model_type
        for name in kinds:
            if getattr(large, name, None):
                assert set(getattr(large, name)) <= set(getattr(tiny, name)), f"{model_type}: {name}"


def test_the_same_seed_gives_the_same_model() -> None:
    first, again, other = (tiny_model("llama", seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_double_precision_and_another_vocabulary(model_type: str) -> None:
    single, double = (tiny_model(model_type, dtype, vocab_size=19) for dtype in (torch.float32, torch.float64))
    logits = double(input_ids=tokens() % 19).logits
    assert logits.dtype == torch.float64
    assert logits.shape == (1, 12, 19)
    torch.testing.assert_close(single(input_ids=tokens() % 19).logits.double(), logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("model_type", [each for each in NOT_TINY if each in causal_types()])
def test_what_cannot_be_tiny_cannot(model_type: str) -> None:
    with pytest.raises((ImportError, ValueError, AttributeError, StrictDataclassError)):
        tiny_model(model_type)(input_ids=tokens())
