"""Sampling: log-probabilities against transformers' own processors, and the trap of sampling without context."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import TopKLogitsWarper

from grade_lightning.policies import Policy
from grade_lightning.policies.prepacked import can_prepack
from grade_lightning.records import Prompts
from grade_lightning.rollouts import Distribution, Sampler
from grade_lightning.rollouts.transformers import _Recorder
from tests.conftest import CONFIGS, VOCABULARY, make_model, make_prompts, make_tokenizer, mostly_slow
from tests.policies.making import change
from tests.rollouts.rolling import SETTINGS, assert_mixed, logps_of, make_policy, make_sampler, roll, teacher_forced


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("name", mostly_slow(CONFIGS, "gpt2", "llama", "gemma3"))
def test_logps_are_those_of_transformers(name: str, settings: dict[str, Any]) -> None:
    """Left padding, early ends, every restriction of the distribution."""
    rollout = roll(make_policy(name), **settings)
    truth = teacher_forced(rollout, name, make_sampler(**settings).distribution)
    torch.testing.assert_close(logps_of(rollout), truth, rtol=1e-4, atol=1e-4)
    assert (logps_of(rollout)[~rollout.completion_mask] == 0).all()
    assert logps_of(rollout).dtype == torch.float32


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_rollout_has_its_context_in_training_with_checkpointing(lora: bool) -> None:
    """The trap, before transformers 5.24: in this mode `generate` loses its cache, and the prompt with it."""
    policy = make_policy("llama", lora)
    policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy.train()
    rollout = roll(policy)
    torch.testing.assert_close(
        logps_of(rollout), teacher_forced(rollout, "llama", Distribution()), rtol=1e-4, atol=1e-4
    )
    assert policy.model.training
    assert policy.base.is_gradient_checkpointing


@pytest.mark.skipif(Version(transformers.__version__) >= Version("5.24"), reason="transformers keeps the cache now")
@pytest.mark.parametrize("name", CONFIGS)
def test_the_trap_is_real(name: str) -> None:
    """What the rollout avoids: in that mode the most likely tokens of `generate` itself are not those of the prompt."""
    model, prompts = make_model(name).eval(), make_prompts()
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 1}
    truth = model.generate(**prompts, **settings)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    blind = model.train().generate(**prompts, **settings)
    assert truth.tolist() != blind.tolist()


def test_rollouts_in_training_and_evaluation_mode_are_the_same() -> None:
    policy = make_policy("llama")
    in_evaluation = roll(policy.eval()).completion_ids
    policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert torch.equal(roll(policy.train()).completion_ids, in_evaluation)


@pytest.mark.parametrize("seed", range(3))
def test_no_end_before_min_new_tokens(seed: int) -> None:
    free, bound = (roll(make_policy(), seed, repeat=40, **settings) for settings in ({}, {"min_new_tokens": 6}))
    assert free.lengths.min() < 6
    assert bound.lengths.min() >= 6
    assert not (bound.completion_ids[:, :5] == 0).any()


def test_top_k_of_one_is_greedy() -> None:
    policy, prompts = make_policy(), make_prompts()
    rollout = Sampler(max_new_tokens=8, top_k=1)(policy, Prompts.of(prompts))
    greedy = make_model().eval().generate(**prompts, max_new_tokens=8, do_sample=False, pad_token_id=1)
    assert torch.equal(rollout.ids, greedy)
    assert (logps_of(rollout) == 0).all()


def test_samples_follow_the_distribution() -> None:
    """Frequencies of the first token over 6,000 samples, to 4.5 standard errors."""
    policy, size = make_policy("gpt2"), 2_000
    rollout = roll(policy, repeat=size, max_new_tokens=1, temperature=1.3, top_k=6)
    prompts = make_prompts()
    with torch.no_grad():
        logits = policy(policy.embed(prompts["input_ids"]), prompts["attention_mask"], 1)[:, 0]
    probs = TopKLogitsWarper(6)(prompts["input_ids"], logits / 1.3).softmax(-1)
    for row in range(3):
        counts = torch.bincount(rollout.completion_ids[row::3, 0], minlength=VOCABULARY)
        error = (probs[row] * (1 - probs[row]) / size).sqrt()
        assert ((counts / size - probs[row]).abs() <= 4.5 * error + 1e-6).all()


def test_padding_with_the_end_of_sequence_token() -> None:
    """The first such token belongs to the completion, the padding after it does not."""
    tokenizer = make_tokenizer()
    tokenizer.pad_token = "<eos>"
    policy = Policy.from_model(make_model(), tokenizer)
    rollout = roll(policy)
    assert_mixed(rollout)
    for ids, mask, ended in zip(rollout.completion_ids, rollout.completion_mask, rollout.ended, strict=True):
        length = int(mask.sum())
        assert bool(ended) == (0 in ids.tolist())
        assert length == (ids.tolist().index(0) + 1 if ended else len(ids))
        assert (ids[length:] == 0).all()
    truth = teacher_forced(rollout, "gpt2", Distribution())
    torch.testing.assert_close(logps_of(rollout), truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_models_own_penalties_are_ignored_and_its_ends_honoured(lora: bool) -> None:
    policy = make_policy(lora=lora)
    plain = roll(policy)
    policy.base.generation_config.repetition_penalty = 5.0
    policy.base.generation_config.no_repeat_ngram_size = 1
    policy.base.generation_config.suppress_tokens = [2, 3, 4]
    assert torch.equal(roll(policy).completion_ids, plain.completion_ids)

    policy.base.generation_config.eos_token_id = [0, 5, 6]
    rollout = roll(policy)
    assert rollout.eos_ids == [0, 5, 6]
    last = rollout.completion_ids.gather(1, rollout.lengths.unsqueeze(1) - 1)[rollout.ended]
    assert set(last.flatten().tolist()) & {5, 6}
    for ids, mask in zip(rollout.completion_ids, rollout.completion_mask, strict=True):
        assert not set(ids[mask][:-1].tolist()) & {0, 5, 6}
        assert (ids[~mask] == 1).all()


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_sampling_leaves_no_trace(lora: bool) -> None:
    policy = make_policy(lora=lora).train()
    policy.base.generation_config.repetition_penalty = 5.0
    own, before = policy.base.generation_config, copy.deepcopy(policy.base.generation_config.to_dict())
    modes = {name: module.training for name, module in policy.named_modules()}
    state = {name: value.clone() for name, value in policy.state_dict().items()}
    rollout = roll(policy)
    assert policy.base.generation_config is own
    assert own.to_dict() == before
    assert {name: module.training for name, module in policy.named_modules()} == modes
    assert all(torch.equal(value, state[name]) for name, value in policy.state_dict().items())
    assert not logps_of(rollout).requires_grad
    with pytest.raises((RuntimeError, ValueError, IndexError)):  # a failure restores it, too
        Sampler()(policy, Prompts(torch.full((1, 2), VOCABULARY + 5), torch.ones(1, 2, dtype=torch.int64)))
    assert policy.base.generation_config is own
    assert {name: module.training for name, module in policy.named_modules()} == modes


def test_a_model_without_end_runs_to_the_limit() -> None:
    tokenizer = make_tokenizer()
    policy = Policy.from_model(make_model(), tokenizer)
    policy.base.generation_config.eos_token_id = None
    tokenizer.eos_token = None
    rollout = roll(policy)
    assert policy.eos_ids == []
    assert rollout.completion_mask.all()
    assert not rollout.ended.any()


class Fed:
    """Rows and tokens of each forward pass."""

    def __init__(self, policy: Policy) -> None:
        self.shapes: list[tuple[int, ...]] = []
        policy.base.register_forward_pre_hook(
            lambda module, args, kwargs: self.shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
        )


def test_prompts_in_a_row_are_read_once() -> None:
    policy, sampler = make_policy(), Sampler(max_new_tokens=2)
    prompts = Prompts.of(make_prompts()).repeat(torch.full((3,), 4))
    sampler(policy, prompts)  # the first time a few tokens are tried before
    fed = Fed(policy)
    sampler(policy, prompts)
    rows, width = prompts.ids.shape
    assert fed.shapes == [(rows // 4, width - 1), (rows, 1), (rows, 1)]


def test_ended_completions_leave_the_batch() -> None:
    """With blocks of one token each completion is fed as many tokens as it has, but the last."""
    policy, sampler = make_policy(), make_sampler(block=1, max_new_tokens=20)
    prompts = Prompts.of(make_prompts()).repeat(torch.full((3,), 4))
    sampler(policy, prompts)  # the first time a few tokens are tried before
    fed = Fed(policy)
    torch.manual_seed(0)
    rollout = sampler(policy, prompts)
    lengths = rollout.lengths.tolist()
    assert len(set(lengths)) > 2
    assert [rows for rows, _ in fed.shapes[1:]] == [sum(length > t for length in lengths) for t in range(max(lengths))]


def test_a_prompt_of_one_token() -> None:
    policy = make_policy()
    ids = torch.tensor([[5], [5], [7]])
    rollout = Sampler(max_new_tokens=4, min_new_tokens=2)(policy, Prompts(ids, torch.ones_like(ids)))
    truth = teacher_forced(rollout, "gpt2", Distribution(max_new_tokens=4, min_new_tokens=2))
    torch.testing.assert_close(logps_of(rollout), truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_static_cache_changes_nothing(name: str) -> None:
    dynamic, static = (roll(make_policy(name), static_cache=static, block=99) for static in (False, True))
    assert torch.equal(dynamic.completion_ids, static.completion_ids)
    torch.testing.assert_close(logps_of(dynamic), logps_of(static), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_bfloat16_draws_from_nearly_the_same_distribution(name: str) -> None:
    """The weights, and what is computed afterwards, stay in float32."""
    policy = make_policy(name)
    rollout = roll(policy, bfloat16=True)
    gaps = (logps_of(rollout) - teacher_forced(rollout, name, Distribution())).abs()[rollout.completion_mask]
    assert 1e-4 < gaps.mean() < 0.05
    assert logps_of(rollout).dtype == torch.float32
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("settings", [{"static_cache": True}, {}, {"block": 1}], ids=str)
def test_sampling_stops_where_all_have_ended(settings: dict[str, Any]) -> None:
    rollout = roll(make_policy(), seed=3, max_new_tokens=50, repeat=1, **settings)
    assert rollout.ended.all()
    assert rollout.completion_ids.shape[1] == rollout.lengths.max() < 50


def test_steps_that_are_undone_leave_no_logps() -> None:
    """On a GPU transformers looks for ends a step late, and takes back what came after them."""
    torch.manual_seed(0)
    recorder, ids, scores = _Recorder(Distribution(), [0], 1), torch.tensor([[3], [4]]), torch.randn(4, 2, 6)
    for step in scores:
        ids = torch.cat([ids, recorder(ids, step).argmax(-1, keepdim=True)], dim=1)
    whole = scores.log_softmax(-1).gather(-1, ids[:, 1:].T.unsqueeze(-1)).squeeze(-1).T
    torch.testing.assert_close(recorder.logps(3), whole[:, :3])
    torch.testing.assert_close(recorder.logps(4), whole)


@pytest.mark.parametrize(("longest", "prepack", "packed"), [(20, True, True), (20, False, False), (15, True, False)])
def test_weights_in_another_layout_are_made_anew_for_each_rollout(longest: int, prepack: bool, packed: bool) -> None:
    """A step of the optimizer between two rollouts is seen by the second; few tokens are not worth it."""
    policy = make_policy("llama", lora=True)
    sampler = make_sampler(max_new_tokens=longest, prepack=prepack)
    sampler(policy, Prompts.of(make_prompts()))  # the trial, which tries it in any case
    layers: list[bool] = []
    with torch.no_grad(), spied(policy.base.get_output_embeddings(), layers):
        for _ in range(2):
            rollout = sampler(policy, Prompts.of(make_prompts()))
            length = rollout.completion_ids.shape[1]
            with policy.evaluating():
                logits = policy.logits(policy.embed(rollout.ids[:, :-1]), rollout.mask[:, :-1], length)
            truth = logits.log_softmax(-1).gather(-1, rollout.completion_ids.unsqueeze(-1)).squeeze(-1)
            difference = (truth - logps_of(rollout))[rollout.sampled].abs().max()
            assert difference < 1e-4
            change(policy)
    assert any(layers) == (packed and can_prepack())


@contextmanager
def spied(module: torch.nn.Module, found: list[bool]) -> Iterator[None]:
    """Notes at each call whether the layer computes in another way."""
    hook = module.register_forward_pre_hook(
        lambda layer, inputs: found.append("prepacked" in getattr(vars(layer).get("forward"), "__module__", ""))
    )
    try:
        yield
    finally:
        hook.remove()
