"""Models that cannot be loaded, or are not what they seem; dropout and numbers as they are wanted."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from grade_lightning.errors import InputError
from grade_lightning.methods import RewardModel
from grade_lightning.policies import Policy, bundled_folder, resolve_model
from grade_lightning.policies.loading import load_pretrained
from tests.conftest import VOCABULARY, make_model, make_tokenizer
from tests.policies.making import logits, reference_logits


@pytest.mark.parametrize("load", [lambda path: Policy(path).load(), lambda path: RewardModel(path).configure_model()])
def test_a_token_that_the_model_does_not_embed_is_named(load: Callable[[str], None], tmp_path: Path) -> None:
    """As of who adds a padding token to the tokenizer alone."""
    make_model("llama").save_pretrained(tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    load(str(tmp_path))
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=rf"last token is {VOCABULARY} .*PAD.* the model embeds {VOCABULARY}"):
        load(str(tmp_path))


def test_a_folder_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Such a name could be one on the Hub, and then transformers speaks of the connection alone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="there is no folder reward here"):
        load_pretrained(AutoTokenizer, "reward")
    (tmp_path / "reward").mkdir()
    with pytest.raises(InputError) as caught:
        load_pretrained(AutoTokenizer, "reward")
    assert "no folder" not in str(caught.value)


def test_dropout_of_the_configuration_is_off_unless_wanted(folder: Path) -> None:
    assert json.loads((folder / "config.json").read_text())["resid_pdrop"] == 0.5
    for dropout in (False, True):
        policy = Policy(str(folder), dropout=dropout)
        policy.load()
        policy.train()
        torch.manual_seed(0)
        first, second = logits(policy), logits(policy)
        assert torch.equal(first, second) is not dropout
        assert torch.allclose(first, reference_logits(policy), atol=1e-5) is not dropout
        assert torch.equal(reference_logits(policy), reference_logits(policy))


def test_loading_twice_does_nothing(folder: Path) -> None:
    policy = Policy(str(folder))
    policy.load(reference=False)
    model = policy.model
    policy.load()
    assert policy.model is model
    assert policy.reference is None


def test_weights_have_the_wanted_dtype(folder: Path) -> None:
    policy = Policy(str(folder), dtype="bfloat16", attn_implementation="eager")
    policy.load()
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.bfloat16}
    assert policy.base.config._attn_implementation == "eager"


class TestInputErrors:
    def test_folder_without_a_model(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"config\.json") as caught:
            Policy(str(tmp_path)).load()
        assert str(tmp_path) in str(caught.value)

    @pytest.mark.parametrize("path", ["./nowhere", "../nowhere", "/no/where", "no/such/folder"])
    def test_missing_folder(self, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(InputError, match="no such folder") as caught:
            Policy(path).load()
        assert path in str(caught.value)

    def test_damaged_weights(self, folder: Path, tmp_path: Path) -> None:
        for file in folder.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        weights = tmp_path / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        with pytest.raises(InputError) as caught:
            Policy(str(tmp_path)).load()
        assert str(tmp_path) in str(caught.value)

    def test_missing_weights(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
        with pytest.raises(InputError) as caught:
            Policy(str(tmp_path)).load()
        assert str(tmp_path) in str(caught.value)

    def test_damaged_configuration(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{")
        with pytest.raises(InputError) as caught:
            Policy(str(tmp_path)).load()
        assert str(tmp_path) in str(caught.value)

    @pytest.mark.parametrize("dtype", ["int8", "float33", "nn"])
    def test_bad_dtype(self, dtype: str) -> None:
        with pytest.raises(InputError, match=dtype):
            Policy("gpt2", dtype=dtype)

    def test_bundled_models_not_built(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("GRADE_LIGHTNING_CACHE", str(tmp_path))
        assert bundled_folder().parent == tmp_path
        with pytest.raises(InputError, match="prepare"):
            resolve_model("bundled", "reward")

    def test_tokenizer_that_cannot_pad(self, folder: Path, tmp_path: Path) -> None:
        for file in folder.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        tokenizer = make_tokenizer()
        tokenizer.pad_token = None
        tokenizer.save_pretrained(tmp_path)
        assert Policy(str(tmp_path)).tokenizer.pad_token == "<eos>"
        tokenizer.eos_token = None
        tokenizer.save_pretrained(tmp_path)
        with pytest.raises(InputError, match="neither"):
            _ = Policy(str(tmp_path)).tokenizer
