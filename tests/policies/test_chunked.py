"""ChunkedPass: the gradient of the whole pass, whatever the chunks; in the mean where chunks are left out."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import grade_lightning.policies.chunked as chunked
from grade_lightning.errors import InputError
from grade_lightning.functional.sequences import position_ids
from grade_lightning.methods import PPO, RLOO, GradeSTE
from grade_lightning.modules import AlignmentModule
from grade_lightning.policies import ChunkedPass, LoRA, Policy, WholePass
from tests.conftest import make_model, make_prompts, make_tokenizer, mostly_slow
from tests.methods.toy_task import batches, fit, make
from tests.policies.making import with_and_without_lora

LENGTH = 7


def policy(name: str, training_pass: Any, lora: bool = False) -> Policy:
    torch.manual_seed(0)
    model = make_model(name, torch.float64)
    found = Policy.from_model(model, make_tokenizer(), LoRA(r=2, dropout=0.0) if lora else None, True, training_pass)
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.requires_grad and lora:
                parameter.add_(0.1)
    return found


def gradients(network: Policy, weights: Tensor | None = None) -> dict[str, Tensor]:
    """Of some numbers of the hidden states, at all weights and at the inputs."""
    batch = make_prompts((LENGTH, 4, 6))
    inputs = network.embed(batch["input_ids"])
    inputs = inputs if inputs.requires_grad else inputs.requires_grad_()
    inputs.retain_grad()
    states = network.states(inputs, batch["attention_mask"], position_ids(batch["attention_mask"]))
    generator = torch.Generator().manual_seed(5)
    there = batch["attention_mask"].unsqueeze(-1)
    cotangent = torch.randn(states.shape, generator=generator, dtype=states.dtype) * there
    (states * (cotangent if weights is None else cotangent * weights.view(1, -1, 1))).sum().backward()
    found = {name: p.grad.clone() for name, p in network.model.named_parameters() if p.grad is not None}
    network.zero_grad()
    assert inputs.grad is not None
    return found | {"inputs": inputs.grad, "states": states.detach() * there}


def assert_equal(one: dict[str, Tensor], two: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    missing = {name for name in one.keys() ^ two.keys() if (one | two)[name].any()}
    assert not missing
    for name in one.keys() & two.keys():
        gap = float((one[name] - two[name]).abs().max() / one[name].abs().max().clamp(min=1e-12))
        assert gap < tolerance, (name, gap)


@pytest.mark.parametrize("chunk", [1, 2, 3, 6])
@with_and_without_lora
@pytest.mark.parametrize("name", mostly_slow(["gpt2", "llama", "qwen3", "gpt_neox"], "gpt2", "llama"))
def test_the_gradient_is_that_of_the_whole_pass(name: str, lora: bool, chunk: int) -> None:
    """Of weights, of adapters, and of the inputs, with prompts padded on the left."""
    whole, parts = (gradients(policy(name, how, lora)) for how in (WholePass(), ChunkedPass(chunk)))
    # transformers computes some parts of other networks in float32
    assert_equal(whole, parts, 1e-10 if name == "gpt2" else 1e-5)


def test_a_chunk_without_gradient_is_skipped_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last two chunks have none of their own and none from later ones; the first has what the second hands on."""
    weights = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    whole = gradients(policy("gpt2", WholePass()), weights)
    backward: list[int] = []
    plain = chunked.continuation

    def counted(*args: Any) -> Any:
        call = plain(*args)

        def counting(inputs: Tensor, cache: Any, first: int) -> Tensor:
            if torch.is_grad_enabled():
                backward.append(first)
            return call(inputs, cache, first)

        return counting

    monkeypatch.setattr(chunked, "continuation", counted)
    assert_equal(whole, gradients(policy("gpt2", ChunkedPass(2)), weights))
    assert backward == [2, 0]


def test_chunks_that_are_kept_by_chance_are_right_in_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over all sets of kept chunks, weighted by their probability; a single one is far off."""
    keep, drawn = 0.6, iter(())
    monkeypatch.setattr(chunked, "_chance", lambda: next(drawn))
    whole = gradients(policy("gpt2", WholePass()))
    mean: dict[str, Tensor] = {}
    furthest = 0.0
    for kept in itertools.product([True, False], repeat=4):
        drawn = iter([0.0 if here else 1.0 for here in kept])
        found = gradients(policy("gpt2", ChunkedPass(2, keep)))
        share = keep ** sum(kept) * (1 - keep) ** (4 - sum(kept))
        for name, value in found.items():
            mean[name] = mean.get(name, torch.zeros_like(value)) + share * value
        furthest = max(furthest, float((found["inputs"] - whole["inputs"]).norm() / whole["inputs"].norm()))
    mean["states"] = whole["states"]
    assert_equal(whole, mean)
    assert furthest > 0.5


@pytest.mark.parametrize("method", [GradeSTE, RLOO, PPO])
def test_runs_are_those_of_the_whole_pass(method: type[AlignmentModule]) -> None:
    """Several hops over the same graph, several steps on a window."""
    found = []
    for how in (None, ChunkedPass(3)):
        module = make(method)
        if how is not None:
            module.policy.training_pass = how
        found.append([step["train/loss"] for step in fit(module, 3, batches(3)).steps])
    assert found[1] == pytest.approx(found[0], rel=1e-3, abs=1e-4)
    assert any(found[0])


def test_what_cannot_be_cut_into_chunks_is_refused_when_it_is_loaded() -> None:
    with pytest.raises(InputError, match=r"ChunkedPass: Gemma3ForCausalLM has layers with a sliding window or a state"):
        policy("gemma3", ChunkedPass(2))
    checked = policy("gpt2", WholePass())
    checked.gradient_checkpointing = True
    with pytest.raises(InputError, match="ChunkedPass recomputes activations by itself"):
        ChunkedPass(2).check(checked)
    with pytest.raises(InputError, match="chunk"):
        ChunkedPass(0)
    with pytest.raises(InputError, match="keep"):
        ChunkedPass(2, keep=0.0)
