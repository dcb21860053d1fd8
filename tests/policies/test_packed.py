"""Packed sequences against padded ones: hidden states, statistics, gradients, runs."""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from grade_lightning.functional.dense_rows import dense_rows
from grade_lightning.methods import DPO, PPO, RLOO, GradeSTE, SupervisedFineTuning
from grade_lightning.modules.measuring import measure
from grade_lightning.policies import LoRA, PackedPass, Pass, Policy, WholePass, packed
from grade_lightning.rollouts import Distribution, Sampler
from tests.conftest import make_model, make_prompts, make_tokenizer
from tests.methods.test_grade_ste import gradients
from tests.methods.toy_task import Toy, batches, fit
from tests.policies.making import with_and_without_lora
from tests.policies.test_passes import assert_the_same, figures, in_double, make, rollout

Shapes = list[tuple[int, ...]]


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Shapes:
    """Shapes of the dense rows that go through a network."""
    found: Shapes = []

    def watched(*args: Any) -> Any:
        packing = dense_rows(*args)
        found.append(tuple(packing.source.shape))
        return packing

    monkeypatch.setattr(packed, "dense_rows", watched)
    return found


@with_and_without_lora
@pytest.mark.parametrize("alone", [True, False], ids=["by sequence", "under a mask"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3"])
def test_packing_changes_nothing(
    name: str, alone: bool, lora: bool, rows: Shapes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ragged prompts and completions, of the policy and its reference; under a mask as on a GPU."""
    if not alone:
        monkeypatch.setattr(packed, "can_attend_by_sequence", lambda *args: False)
    whole = figures(make(name, WholePass(), lora), rollout())
    assert rows == []
    policy = make(name, PackedPass(), lora)
    assert len(rows) == 1 + alone  # the trial
    del rows[:]
    assert_the_same(whole, figures(policy, rollout()))
    assert rows == 3 * [(1, 47) if alone else (3, 17)]  # instead of 7 × 11: two passes of the policy, one reference
    assert policy.base.config._attn_implementation == "sdpa"


@with_and_without_lora
def test_gradient_checkpointing_changes_nothing(lora: bool, rows: Shapes) -> None:
    policy = make("qwen3", PackedPass(), lora)
    policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert policy.base.is_gradient_checkpointing
    del rows[:]
    assert_the_same(figures(make("qwen3", WholePass(), lora), rollout()), figures(policy, rollout()))
    assert rows[:2] == 2 * [(3, 17)]  # attention by sequence would not be there when activations are computed again


def test_a_mask_that_is_added_is_the_same(rows: Shapes) -> None:
    """GPT-2's alone: the eager softmax of the others is in single precision."""
    whole, other = (make("gpt2", one, attention="eager") for one in (WholePass(), PackedPass()))
    assert_the_same(figures(whole, rollout()), figures(other, rollout()))
    assert len(rows) == 4


def test_layers_with_a_sliding_window_are_packed(rows: Shapes) -> None:
    """A window of 8 in rows in which other sequences stand before one of up to 11 tokens."""
    whole, other = (figures(make("gemma3", one), rollout()) for one in (WholePass(), PackedPass()))
    assert rows[2:] == 3 * [(1, 47)]
    for name, value in whole.items():  # its softmax is in single precision
        assert float((value - other[name]).abs().max() / value.abs().max()) < 1e-5, name


def test_without_padding_nothing_is_packed(rows: Shapes) -> None:
    policy = make("gpt2", PackedPass())
    ids = torch.randint(2, 19, (3, 9), generator=torch.Generator().manual_seed(0))
    mask, inputs = torch.ones_like(ids), policy.embed(ids)
    del rows[:]
    assert torch.equal(policy.hidden(inputs, mask, 4), make("gpt2", WholePass()).hidden(inputs, mask, 4))
    assert rows == []


def test_padding_has_no_hidden_states_and_sends_no_gradient(rows: Shapes) -> None:
    policy, batch = make("llama", PackedPass()), make_prompts((9, 2, 3))
    inputs = policy.embed(batch["input_ids"]).detach().requires_grad_()
    states = policy.hidden(inputs, batch["attention_mask"], 9)
    states.square().sum().backward()
    there = batch["attention_mask"].bool()
    assert inputs.grad is not None
    assert not states[~there].any()
    assert not inputs.grad[~there].any()
    assert states[there].any(-1).all()
    assert inputs.grad[there].any(-1).all()


# ---- methods


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "RLOO": (RLOO, {"num_generations": 4}),
    "PPO": (PPO, {"num_generations": 4, "epochs": 2, "minibatches": 2}),
    "GradeSTE": (GradeSTE, {}),
    "GradeSTE, two hops": (GradeSTE, {"hops": 2}),
    "GradeSTE, whole KL": (GradeSTE, {"kl_prefix": "full", "beta": 0.1, "hops": "exact"}),
    "DPO": (DPO, {"num_generations": 4}),
    "supervised": (SupervisedFineTuning, {}),
}


def module(name: str, training_pass: Pass, lora: bool = False) -> Any:
    """In double precision, away from its reference."""
    method, settings = CASES[name]
    torch.manual_seed(0)
    adapters = LoRA(r=2, dropout=0.0) if lora else None
    model = in_double(make_model("llama", torch.float64))
    policy = Policy.from_model(model, make_tokenizer(), adapters, training_pass=training_pass)
    policy.eos_ids = [0, 2, 3, 4, 5]  # so that completions are of different length
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    if method is SupervisedFineTuning:
        return method(policy=policy)
    optimizer: Any = lambda parameters: torch.optim.SGD(parameters, lr=0.05)  # noqa: E731
    made: Any = method(policy=policy, reward=Toy(), sampler=Sampler(max_new_tokens=9), optimizer=optimizer, **settings)
    made.configure_model()
    return made


@with_and_without_lora
@pytest.mark.parametrize("name", CASES)
def test_the_gradient_of_a_method_is_that_of_padded_rows(name: str, lora: bool, rows: Shapes) -> None:
    """Of the same completions, hops included."""
    found: list[Tensor] = []
    for way in (WholePass(), PackedPass()):
        made = module(name, way, lora)
        del rows[:]
        torch.manual_seed(3)
        batch = next(iter(batches()))
        if name == "supervised":  # texts are padded on the right
            batch |= {part: value.flip(-1) for part, value in make_prompts((9, 2, 2, 1)).items()}
        made.draw_loss(batch).backward()
        found.append(gradients(made))
        assert bool(rows) == isinstance(way, PackedPass)
    assert float(found[0].norm()) > 1e-3
    assert float((found[1] - found[0]).norm() / found[0].norm()) < 1e-10


@pytest.mark.parametrize("name", ["RLOO", "PPO", "GradeSTE"])
def test_curves_are_those_of_padded_rows(name: str, rows: Shapes) -> None:
    steps = []
    for way in (WholePass(), PackedPass()):
        del rows[:]
        made = module(name, way)
        made._started = False  # it is away from its reference
        steps.append(fit(made, 4, varied(4)).steps)
        assert bool(rows) == isinstance(way, PackedPass)
    for whole, other in zip(*steps, strict=True):
        for key in ("train/loss", "train/reward", "train/kl", "train/entropy"):
            assert other[key] == pytest.approx(whole[key], rel=1e-5, abs=1e-6), key
    assert len({step["train/reward"] for step in steps[0]}) > 1


def varied(count: int) -> DataLoader[Any]:
    """Prompts of other lengths in each batch."""

    def each() -> Iterator[Any]:
        for shift in range(count):
            prompts = make_prompts((5, 3 + shift % 2, 2))
            yield {name: value.repeat(2, 1) for name, value in prompts.items()} | {"columns": {}}

    return DataLoader(list(each()), batch_size=None)  # type: ignore[arg-type]


# ---- where it cannot be done


def test_what_takes_no_packed_sequences_says_so_and_is_padded(rows: Shapes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that makes its own positions says nothing of itself; a few tokens do."""
    model = make_model("gpt2", torch.float64)
    forward = model.base_model.forward

    def own_positions(*args: Any, **kwargs: Any) -> Any:
        given = kwargs.get("position_ids")
        if kwargs.get("attention_mask") is None and given is not None:
            kwargs["position_ids"] = torch.arange(given.shape[1])[None]
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.base_model, "forward", own_positions)
    with pytest.warns(UserWarning, match=r"cannot take packed sequences .* \(its hidden states differ by"):
        policy = Policy.from_model(model, make_tokenizer(), training_pass=PackedPass())
    del rows[:]
    measure(policy, Distribution(), rollout())
    assert rows == []
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*cannot take packed")
        make("llama", PackedPass())


def test_layers_with_a_state_are_refused_without_a_trial(rows: Shapes) -> None:
    policy = make("gpt2", WholePass())
    policy.base.config.layer_types = ["full_attention", "linear_attention"]
    assert packed._obstacle(policy) == "it has layers that carry a state from token to token, or attend to blocks"
    assert rows == []


def test_a_pass_that_comes_too_late_is_named() -> None:
    policy = make("gpt2", WholePass())
    policy.training_pass = PackedPass()
    with pytest.raises(RuntimeError, match=r"before Policy.load\(\)"):
        measure(policy, Distribution(), rollout())
