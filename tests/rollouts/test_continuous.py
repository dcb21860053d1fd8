"""Continuous batching: log-probabilities, the distribution, what it refuses, and what it leaves behind."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState

from grade_lightning.errors import DivergenceError, InputError
from grade_lightning.policies import Policy
from grade_lightning.records import Prompts, Rollout
from grade_lightning.rollouts import ContinuousBatchingEngine, Distribution, Engine, Sampler, TransformersEngine
from grade_lightning.rollouts.continuous import _Processed
from tests.conftest import VOCABULARY, make_model, make_prompts, make_tokenizer, mostly_slow
from tests.rollouts.agreement import assert_agrees_over_a_resume, assert_follows_the_distribution
from tests.rollouts.rolling import SETTINGS, assert_mixed, logps_of, make_policy, teacher_forced

_OTHERS = {"block", "static_cache", "prepack"}
_SETTINGS = {name: settings for name, settings in SETTINGS.items() if not _OTHERS & set(settings)}


def draw(policy: Policy, repeat: int = 4, seed: int = 0, engine: Any = None, **settings: Any) -> Rollout:
    torch.manual_seed(seed)
    prompts = Prompts.of(make_prompts()).repeat(torch.full((3,), repeat))
    return Sampler(**{"max_new_tokens": 8} | settings, engine=engine or ContinuousBatchingEngine())(policy, prompts)


@pytest.mark.parametrize("settings", _SETTINGS.values(), ids=_SETTINGS)
@pytest.mark.parametrize("name", mostly_slow(["gpt2", "llama", "qwen3", "gemma3"], "llama"))
def test_logps_are_those_of_the_model_alone(name: str, settings: dict[str, Any]) -> None:
    rollout = draw(make_policy(name), **settings)
    truth = teacher_forced(rollout, name, Distribution(**{"max_new_tokens": 8} | settings))
    torch.testing.assert_close(logps_of(rollout), truth, rtol=0, atol=2e-5)
    assert (logps_of(rollout)[~rollout.completion_mask] == 0).all()
    assert (rollout.completion_ids[~rollout.completion_mask] == 1).all()


@pytest.mark.parametrize("updates", [4, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    "engine", mostly_slow([ContinuousBatchingEngine, TransformersEngine], ContinuousBatchingEngine)
)
def test_it_samples_the_policy_that_learns_also_after_a_resume(
    engine: Callable[[], Engine], lora: bool, updates: int, tmp_path: Path
) -> None:
    assert_agrees_over_a_resume(engine, tmp_path, lora, updates)


def test_samples_follow_the_distribution() -> None:
    assert_follows_the_distribution(ContinuousBatchingEngine(), make_policy("llama"), Prompts.of(make_prompts()))


def test_completions_of_a_prompt_are_drawn_independently() -> None:
    rollout = draw(make_policy("llama"), repeat=12)
    for rows in rollout.completion_ids.split(12):
        assert len({tuple(row.tolist()) for row in rows}) > 6
        assert len(set(rows[:, 0].tolist())) > 2


def test_some_end_and_rows_keep_their_order() -> None:
    policy = make_policy("llama")
    columns = {"row": list(range(3))}
    torch.manual_seed(0)
    prompts = Prompts.of(make_prompts() | {"columns": columns}).repeat(torch.tensor([1, 7, 4]))
    rollout = Sampler(max_new_tokens=8, engine=ContinuousBatchingEngine())(policy, prompts)
    assert_mixed(rollout)
    assert rollout.columns["row"] == [0] + [1] * 7 + [2] * 4
    assert torch.equal(rollout.prompt_ids, prompts.ids)
    truth = teacher_forced(rollout, "llama", Distribution(max_new_tokens=8))  # of other prompts it would be another
    torch.testing.assert_close(logps_of(rollout), truth, rtol=0, atol=2e-5)


def test_prompts_in_a_row_are_read_once() -> None:
    policy, fed = make_policy("llama"), []
    policy.base.register_forward_pre_hook(
        lambda _, args, kwargs: fed.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    draw(policy, max_new_tokens=2, min_new_tokens=2)
    assert fed == [12 - 3, 12, 12]  # of the prompts all tokens but the last, and then one for each completion


@pytest.mark.parametrize(
    "engine", [ContinuousBatchingEngine(page_size=4), ContinuousBatchingEngine(max_batch_tokens=5)]
)
def test_small_pages_and_small_batches_change_no_logps(engine: ContinuousBatchingEngine) -> None:
    rollout = draw(make_policy("llama"), engine=engine, min_new_tokens=3)
    truth = teacher_forced(rollout, "llama", Distribution(max_new_tokens=8, min_new_tokens=3))
    torch.testing.assert_close(logps_of(rollout), truth, rtol=0, atol=2e-5)


def test_a_prompt_of_one_token() -> None:
    ids = torch.tensor([[5], [5], [7]])
    sampler = Sampler(max_new_tokens=4, engine=ContinuousBatchingEngine())
    rollout = sampler(make_policy("llama"), Prompts(ids, torch.ones_like(ids)))
    truth = teacher_forced(rollout, "llama", Distribution(max_new_tokens=4))
    torch.testing.assert_close(logps_of(rollout), truth, rtol=0, atol=2e-5)


def test_completions_end_after_a_stop_string() -> None:
    rollout = draw(make_policy("llama"), repeat=8, max_new_tokens=20, stop="w5")
    assert rollout._stopped.any()
    for text in rollout.completions:
        assert "w5" not in text[: -len("w5")]


def test_the_seed_decides() -> None:
    policy = make_policy("llama")
    assert torch.equal(draw(policy, seed=1).completion_ids, draw(policy, seed=1).completion_ids)
    assert not torch.equal(draw(policy, seed=1).completion_ids, draw(policy, seed=2).completion_ids)


def test_a_request_that_lost_its_pages_keeps_its_position() -> None:
    request = RequestState("0", [5, 6, 7], max_new_tokens=8)
    request.generated_tokens = [8, 9]
    again = request.create_equivalent_initial_request()
    again.generated_tokens = [10]
    states = [FutureRequestState(state, True, {}, 1) for state in (RequestState("1", [5]), request, again)]
    assert _Processed(Distribution(), []).prepare_tensor_args(states).tolist() == [0, 2, 3]


def test_sampling_leaves_no_trace() -> None:
    policy = make_policy("llama").train()
    policy.base.generation_config.repetition_penalty = 5.0
    own, before = policy.base.generation_config, copy.deepcopy(policy.base.generation_config.to_dict())
    attention, plain = policy.base.config._attn_implementation, make_policy("llama")
    assert torch.equal(draw(policy).completion_ids, draw(plain).completion_ids)  # its own penalties are ignored
    assert policy.base.generation_config is own
    assert own.to_dict() == before
    assert policy.base.config._attn_implementation == attention
    assert all(module.training for module in policy.model.modules())


def test_attention_that_is_eager_is_so_again_afterwards() -> None:
    policy = make_policy("llama")
    policy.base.set_attn_implementation("eager")
    rollout = draw(policy)
    torch.testing.assert_close(
        logps_of(rollout), teacher_forced(rollout, "llama", Distribution(max_new_tokens=8)), rtol=0, atol=2e-5
    )
    assert policy.base.config._attn_implementation == "eager"


def test_a_policy_that_has_diverged() -> None:
    policy = make_policy("llama")
    with torch.no_grad():
        policy.base.get_output_embeddings().weight.fill_(torch.nan)
    with pytest.raises(DivergenceError, match=r"lower --model\.optimizer\.lr"):
        draw(policy)


def test_too_little_memory_is_one_line() -> None:
    with pytest.raises(InputError, match=r"ContinuousBatchingEngine: no memory .*lower --model\.sampler\.at_once"):
        draw(make_policy("llama"), engine=ContinuousBatchingEngine(max_memory=1e-9))


def test_a_model_with_a_recurrent_state_is_refused() -> None:
    from tests.policies.tiny import tiny_model

    policy = Policy.from_model(tiny_model("mamba", vocab_size=VOCABULARY), make_tokenizer())
    with pytest.raises(InputError, match=r"MambaForCausalLM keeps more .* take the TransformersEngine"):
        draw(policy)


def test_what_fails_in_the_model_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    policy = Policy.from_model(model, make_tokenizer())
    monkeypatch.setattr(model.model, "forward", lambda *_, **__: 1 / 0)
    with pytest.raises(InputError, match=r"continuous batching: ZeroDivisionError: .* take the TransformersEngine"):
        draw(policy)
