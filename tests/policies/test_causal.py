"""The policy against transformers itself, for every architecture."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from grade_lightning.errors import InputError
from grade_lightning.methods import GradeSTE, RewardModel
from grade_lightning.module import Experience
from grade_lightning.policies import LoRA, Policy, ValueHead, bundled_folder, resolve_model
from grade_lightning.rewards import Classifier, ClassifierReward
from grade_lightning.rollouts import Sampler
from tests.conftest import CONFIGS, VOCABULARY, make_model, make_prompts, make_tokenizer

every_architecture = pytest.mark.parametrize("name", CONFIGS)
with_and_without_lora = pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])


def make_policy(name: str = "gpt2", lora: bool = False) -> Policy:
    return Policy.from_model(make_model(name), make_tokenizer(), LoRA(r=2, dropout=0.0) if lora else None)


def make_classifier() -> Classifier:
    backbone: Any = make_model(dtype=torch.float64).base_model
    return Classifier(backbone, hidden=8).double()


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
        return policy.reference_logits(policy.reference_embed(prompts["input_ids"]), prompts["attention_mask"], length)


@pytest.mark.parametrize("rows", [VOCABULARY - 1, VOCABULARY + 1])
def test_as_many_logits_as_embedded_tokens(rows: int) -> None:
    model: Any = make_model("llama")
    model.lm_head = torch.nn.Linear(16, rows, bias=False)
    with pytest.raises(InputError, match=rf"embeds {VOCABULARY} tokens, but has logits of {rows}"):
        Policy.from_model(model, make_tokenizer())


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder whose configuration has dropout."""
    path = tmp_path_factory.mktemp("model")
    model = make_model()
    for key in ("attn_pdrop", "embd_pdrop", "resid_pdrop"):
        setattr(model.config, key, 0.5)
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


@every_architecture
@with_and_without_lora
def test_logits_are_those_of_transformers_without_padding(name: str, lora: bool) -> None:
    """Embeddings in, left padding and positions from the mask: what the plain model says of each row by itself."""
    policy, plain, prompts = make_policy(name, lora), make_model(name).eval(), make_prompts()
    found, reference = logits(policy), reference_logits(policy)
    for row, (ids, mask) in enumerate(zip(prompts["input_ids"], prompts["attention_mask"], strict=True)):
        with torch.no_grad():
            truth = plain(input_ids=ids[mask.bool()].unsqueeze(0)).logits[0, -3:]
        torch.testing.assert_close(found[row], truth, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(reference[row], truth, rtol=1e-4, atol=1e-4)


@every_architecture
@with_and_without_lora
def test_hidden_states_are_what_the_logits_are_made_of(name: str, lora: bool) -> None:
    """After the last norm, of the same positions as the logits; the head is the model's own, a chunk at a time, too."""
    policy, prompts = make_policy(name, lora), make_prompts()
    change(policy)
    inputs, mask = policy.embed(prompts["input_ids"]), prompts["attention_mask"]
    hidden, found = policy.hidden(inputs, mask, 3), policy(inputs, mask, 3)
    assert hidden.shape == (3, 3, policy.width)
    head: Any = policy.base.get_output_embeddings()
    torch.testing.assert_close(head(hidden), found)
    torch.testing.assert_close(policy.hidden(inputs, mask, 5)[:, -3:], hidden)
    columns = policy.vocabulary(hidden.flatten(0, 1), elements=4 * VOCABULARY).map(
        lambda logits, rows: logits.unbind(-1)
    )
    torch.testing.assert_close(torch.stack(columns, -1).view_as(found), found)
    hidden.sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in policy.parameters())


def test_a_forward_that_somebody_has_wrapped_stays_wrapped() -> None:
    policy, prompts = make_policy("gpt2", False), make_prompts()
    below: Any = policy.base.base_model
    plain, calls = below.forward, list[int]()

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return plain(*args, **kwargs)

    below.forward = wrapped
    for turn in (1, 2):
        policy(policy.embed(prompts["input_ids"]), prompts["attention_mask"], 3)
        assert len(calls) == turn


def before_5_24(self: Any, input_ids: Tensor, past_key_values: Any = None) -> None: ...


def since_5_24(self: Any, input_ids: Tensor, cache: Any = None) -> None: ...


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(("forward", "name"), [(before_5_24, "past_key_values"), (since_5_24, "cache")])
def test_the_cache_is_called_what_the_model_calls_it(
    forward: Callable[..., None], name: str, lora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy("llama", lora)
    monkeypatch.setattr(type(policy.base), "forward", forward)
    assert policy.cache_name == name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_value_head_takes_the_hidden_states_of_any_policy(dtype: torch.dtype) -> None:
    """Zero at first; then its weights times the hidden state plus its bias, in its own precision."""
    torch.manual_seed(0)
    head, hidden = ValueHead(4), torch.randn(2, 3, 4).to(dtype)
    assert not head(hidden).any()
    torch.nn.init.normal_(head.weight)
    torch.nn.init.constant_(head.bias, 0.5)
    values = head(hidden)
    assert values.dtype == torch.float32
    assert values.shape == (2, 3)
    torch.testing.assert_close(values, (hidden.float() * head.weight[0]).sum(-1) + 0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head(hidden).dtype == torch.float32
    values.sum().backward()
    assert head.bias.grad == 6


@every_architecture
@with_and_without_lora
def test_table_is_the_embedding_of_every_id(name: str, lora: bool) -> None:
    policy = make_policy(name, lora)
    weight = policy.base.get_input_embeddings().get_parameter("weight").detach()
    scale = policy.base.config.hidden_size**0.5 if name == "gemma3" else 1.0
    for table in (policy.table(), policy.reference_table()):
        assert table.shape[0] == VOCABULARY
        assert not table.requires_grad
        torch.testing.assert_close(table, weight * scale)
    assert torch.equal(policy.table(), policy.embed(torch.arange(VOCABULARY)))
    ids = torch.tensor([[3, 0, 18]])
    assert torch.equal(policy.reference_embed(ids), policy.reference_table()[ids])


@every_architecture
@with_and_without_lora
def test_the_reference_is_the_start_and_stays(name: str, lora: bool) -> None:
    policy = make_policy(name, lora)
    start = logits(policy)
    reference = reference_logits(policy)
    torch.testing.assert_close(reference, start)
    change(policy)
    assert torch.equal(reference_logits(policy), reference)
    assert (logits(policy) - start).abs().max() > 0.01


@every_architecture
@with_and_without_lora
def test_what_is_trained(name: str, lora: bool) -> None:
    policy = make_policy(name, lora)
    trained = {key for key, parameter in policy.named_parameters() if parameter.requires_grad}
    if lora:
        assert trained == {key for key, _ in policy.named_parameters() if ".lora_" in key}
        assert policy.reference is None
    else:
        assert trained == {key for key, _ in policy.named_parameters() if key.startswith("model.")}
    reference_logits(policy)  # switching adapters off and on leaves them trainable
    assert {key for key, parameter in policy.named_parameters() if parameter.requires_grad} == trained


@every_architecture
def test_paper_targets_where_the_model_has_them(name: str) -> None:
    adapted = {
        key.split(".lora_")[0].rpartition(".")[2] for key in make_policy(name, True).state_dict() if ".lora_" in key
    }
    own = {"gpt2": {"c_attn"}, "gpt_neox": {"query_key_value"}}
    assert adapted == own.get(name, {"q_proj", "k_proj", "v_proj", "o_proj"})


def test_unknown_targets_are_named() -> None:
    with pytest.raises(InputError, match=r"nothing_like_it.*target_modules"):
        Policy.from_model(make_model(), make_tokenizer(), LoRA(target_modules=["nothing_like_it"]))


@with_and_without_lora
def test_evaluating_restores_every_mode(lora: bool) -> None:
    policy = make_policy(lora=lora).train()
    odd = policy.base.get_input_embeddings().eval()
    before = {name: module.training for name, module in policy.named_modules()}
    assert any(before.values())
    with policy.evaluating() as model:
        assert not any(module.training for module in model.modules())
    assert {name: module.training for name, module in policy.named_modules()} == before
    with pytest.raises(ZeroDivisionError), policy.evaluating():  # a failure restores them, too
        _ = 1 / 0
    assert {name: module.training for name, module in policy.named_modules()} == before
    assert not odd.training


def test_train_leaves_the_reference_in_evaluation_mode() -> None:
    policy = make_policy().train()
    assert policy.model.training
    assert policy.reference is not None
    assert not any(module.training for module in policy.reference.modules())


@every_architecture
@with_and_without_lora
def test_saved_policy_is_the_policy(name: str, lora: bool, tmp_path: Path) -> None:
    """Adapters are merged in what is written, not in what is trained."""
    policy = make_policy(name, lora)
    change(policy)
    truth, reference = logits(policy), reference_logits(policy)
    state = {key: value.clone() for key, value in policy.state_dict().items()}
    policy.save_pretrained(tmp_path)

    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded = Policy.from_model(plain, make_tokenizer(), reference=False)
    torch.testing.assert_close(logits(loaded), truth, rtol=1e-4, atol=1e-4)
    assert not any("lora" in key or "base_layer" in key for key in plain.state_dict())
    again = Policy(str(tmp_path))
    again.load()
    torch.testing.assert_close(logits(again), truth, rtol=1e-4, atol=1e-4)
    assert again.tokenizer.get_vocab() == policy.tokenizer.get_vocab()

    assert policy.state_dict().keys() == state.keys()
    torch.testing.assert_close(logits(policy), truth)
    torch.testing.assert_close(reference_logits(policy), reference)


@with_and_without_lora
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saving_does_not_touch_a_bit_of_the_policy(dtype: torch.dtype, lora: bool, tmp_path: Path) -> None:
    """W + BA − BA is not W in floating point: an export in mid-training must not move policy and reference."""
    policy = Policy.from_model(make_model("llama", dtype), make_tokenizer(), LoRA(r=2, dropout=0.0) if lora else None)
    change(policy)
    state = {key: value.clone() for key, value in policy.state_dict().items()}
    policy.save_pretrained(tmp_path)
    moved = [key for key, value in policy.state_dict().items() if not torch.equal(value, state[key])]
    assert moved == []


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


@with_and_without_lora
def test_gradient_checkpointing_changes_no_gradient(lora: bool, folder: Path) -> None:
    """GRADE-STE differentiates through the same graph several times (hops); recomputation must allow that."""
    found = []
    for checkpointing in (False, True):
        adapters = LoRA(r=2, dropout=0.0) if lora else None
        policy = Policy(str(folder), adapters, dtype="float64", gradient_checkpointing=checkpointing)
        policy.load()
        policy.train()
        assert policy.base.is_gradient_checkpointing is checkpointing
        change(policy)
        torch.manual_seed(5)
        reward = ClassifierReward.from_classifier(make_classifier())
        method = GradeSTE(policy, reward, sampler=Sampler(max_new_tokens=6), hops=2, beta=0.1, kl_prefix="full")
        torch.manual_seed(6)
        prompts = make_prompts()
        rollout = method.sampler(policy, prompts["input_ids"], prompts["attention_mask"])
        method.loss(Experience(rollout, method.reward.pathwise(rollout))).loss.backward()
        found.append({key: p.grad for key, p in policy.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() == {key for key, p in policy.named_parameters() if p.requires_grad}
    for key, gradient in found[0].items():
        torch.testing.assert_close(found[1][key], gradient)
        assert gradient.abs().max() > 0


@pytest.mark.parametrize(("configured", "expected"), [(0, [0]), ([3, 0], [3, 0]), (None, [0])])
def test_end_of_sequence_tokens(configured: Any, expected: list[int]) -> None:
    policy = make_policy()
    policy.base.generation_config.eos_token_id = configured
    assert policy.eos_ids == expected


@every_architecture
def test_context_length(name: str) -> None:
    policy = make_policy(name)
    assert policy.context_length == policy.base.config.max_position_embeddings


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
