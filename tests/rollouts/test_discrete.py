"""Sampling: log-probabilities against transformers' own processors, and the trap of sampling without context."""

import copy
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from grade_lightning.errors import InputError
from grade_lightning.policies import LoRA, Policy
from grade_lightning.rollouts import Rollout, Sampler
from grade_lightning.rollouts.discrete import _Recorder
from tests.conftest import CONFIGS, VOCABULARY, make_model, make_prompts, make_tokenizer

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top-k": {"top_k": 4},
    "top-p": {"top_p": 0.8},
    "minimum": {"min_new_tokens": 4},
    "all": {"temperature": 1.5, "top_k": 9, "top_p": 0.9, "min_new_tokens": 3},
    "blocks": {"block": 3, "min_new_tokens": 2},
    "static cache": {"static_cache": True},
}


def make_policy(name: str = "gpt2", lora: bool = False) -> Policy:
    return Policy.from_model(make_model(name), make_tokenizer(), LoRA(r=2, dropout=0.0) if lora else None)


def roll(policy: Policy, seed: int = 0, repeat: int = 4, **settings: Any) -> Rollout:
    torch.manual_seed(seed)
    ids, mask = (value.repeat(repeat, 1) for value in make_prompts().values())
    return Sampler(**{"max_new_tokens": 8} | settings)(policy, ids, mask)


def teacher_forced(rollout: Rollout, name: str, sampler: Sampler) -> Tensor:
    """Each row by itself, without padding, through the plain model and the processors of transformers."""
    plain = make_model(name).eval()
    result = torch.zeros_like(rollout.logps)
    for row in range(len(result)):
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row].bool()]
        completion = rollout.completion_ids[row][rollout.completion_mask[row]]
        processors = LogitsProcessorList([TemperatureLogitsWarper(sampler.temperature)])
        if sampler.min_new_tokens:
            processors.append(MinNewTokensLengthLogitsProcessor(len(prompt), sampler.min_new_tokens, rollout.eos_ids))
        if sampler.top_k:
            processors.append(TopKLogitsWarper(sampler.top_k))
        if sampler.top_p < 1:
            processors.append(TopPLogitsWarper(sampler.top_p))
        ids: Any = torch.cat([prompt, completion]).unsqueeze(0)
        with torch.no_grad():
            logits = plain(input_ids=ids).logits[0].float()
        for t, token in enumerate(completion):
            end = len(prompt) + t
            scores = processors(ids[:, :end], logits[end - 1 : end].clone())
            result[row, t] = scores.log_softmax(-1)[0, token]
    return result


def assert_mixed(rollout: Rollout) -> None:
    assert rollout.ended.any()
    assert not rollout.ended.all()
    assert not rollout.prompt_mask.all()


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("name", CONFIGS)
def test_logps_are_those_of_transformers(name: str, settings: dict[str, Any]) -> None:
    """Left padding, early ends, every restriction of the distribution."""
    rollout = roll(make_policy(name), **settings)
    truth = teacher_forced(rollout, name, Sampler(**settings))
    torch.testing.assert_close(rollout.logps, truth, rtol=1e-4, atol=1e-4)
    assert (rollout.logps[~rollout.completion_mask] == 0).all()
    assert rollout.logps.dtype == torch.float32


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_training_pass_sees_the_sampled_distribution(settings: dict[str, Any]) -> None:
    policy, sampler = make_policy(), Sampler(max_new_tokens=8, **settings)
    rollout = roll(policy, **settings)
    with torch.no_grad():
        logits = policy(policy.embed(rollout.ids[:, :-1]), rollout.mask[:, :-1], rollout.completion_ids.shape[1])
    logps = sampler.logits(logits, rollout.eos_ids, rollout.completion_ids).log_softmax(-1)
    picked = logps.gather(-1, rollout.completion_ids.unsqueeze(-1)).squeeze(-1)
    keep = rollout.completion_mask
    torch.testing.assert_close(picked[keep], rollout.logps[keep], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_rollout_has_its_context_in_training_with_checkpointing(lora: bool) -> None:
    """The trap, before transformers 5.24: in this mode `generate` loses its cache, and the prompt with it."""
    policy = make_policy("llama", lora)
    policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy.train()
    rollout = roll(policy)
    torch.testing.assert_close(rollout.logps, teacher_forced(rollout, "llama", Sampler()), rtol=1e-4, atol=1e-4)
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
    free, bound = roll(make_policy(), seed), roll(make_policy(), seed, min_new_tokens=6)
    assert free.lengths.min() < 6
    assert bound.lengths.min() >= 6
    assert not (bound.completion_ids[:, :5] == 0).any()


def test_top_k_of_one_is_greedy() -> None:
    policy, prompts = make_policy(), make_prompts()
    rollout = Sampler(max_new_tokens=8, top_k=1)(policy, prompts["input_ids"], prompts["attention_mask"])
    greedy = make_model().eval().generate(**prompts, max_new_tokens=8, do_sample=False, pad_token_id=1)
    assert torch.equal(rollout.ids, greedy)
    assert (rollout.logps == 0).all()


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
    truth = teacher_forced(rollout, "gpt2", Sampler())
    torch.testing.assert_close(rollout.logps, truth, rtol=1e-4, atol=1e-4)


def test_properties_of_a_rollout() -> None:
    rollout = Rollout(
        prompt_ids=torch.tensor([[1, 2], [3, 4]]),
        prompt_mask=torch.tensor([[0, 1], [1, 1]]),
        completion_ids=torch.tensor([[5, 0, 1], [6, 7, 8]]),
        completion_mask=torch.tensor([[True, True, False], [True, True, True]]),
        logps=torch.zeros(2, 3),
        tokenizer=make_tokenizer(),
        eos_ids=[0],
    )
    assert rollout.ids.tolist() == [[1, 2, 5, 0, 1], [3, 4, 6, 7, 8]]
    assert rollout.mask.tolist() == [[0, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert rollout.lengths.tolist() == [2, 3]
    assert rollout.ended.tolist() == [True, False]
    assert rollout.prompts == ["w2", "w3 w4"]
    assert rollout.completions == ["w5", "w6 w7 w8"]


def made(tokens: list[list[int]], start: int = 0) -> Rollout:
    """Completions of these tokens, padded; prompts w2, w3 and so on after `start`."""
    width = max(map(len, tokens))
    mask = torch.arange(width) < torch.tensor([[len(row)] for row in tokens])
    ids = torch.tensor([row + [1] * (width - len(row)) for row in tokens])
    return Rollout(
        prompt_ids=torch.tensor([[1, 2 + start + i] for i in range(len(tokens))]),
        prompt_mask=torch.tensor([[0, 1]] * len(tokens)),
        completion_ids=ids,
        completion_mask=mask,
        logps=-ids.float().masked_fill(~mask, 0),
        tokenizer=make_tokenizer(),
        columns={
            "label": [start + i for i in range(len(tokens))],
            "note": [f"n{start + i}" for i in range(len(tokens))],
        },
        eos_ids=[0],
    )


def test_a_part_of_a_rollout() -> None:
    """Rows in any order and more than once, with their texts and columns, and no longer than the longest of them."""
    whole = made([[5, 0], [6, 7, 8], [9]])
    assert whole.completions == ["w5", "w6 w7 w8", "w9"]
    part = whole.select(torch.tensor([2, 0, 2]))
    assert part.completion_ids.tolist() == [[9, 1], [5, 0], [9, 1]]
    assert part.ids.tolist() == [[4, 9, 1], [2, 5, 0], [4, 9, 1]]
    assert part.lengths.tolist() == [1, 2, 1]
    assert part.ended.tolist() == [False, True, False]
    assert part.logps.tolist() == [[-9, 0], [-5, 0], [-9, 0]]
    assert part.prompts == ["w4", "w2", "w4"]
    assert part.completions == ["w9", "w5", "w9"]
    assert part.columns == {"label": [2, 0, 2], "note": ["n2", "n0", "n2"]}
    assert part.eos_ids == [0]
    assert whole.columns["label"] == [0, 1, 2]


def test_rollouts_of_other_lengths_are_joined() -> None:
    """The shorter ones are padded: with the padding token, outside of the mask, and with log-probability 0."""
    parts = [made([[5, 0], [6]]), made([[7, 8, 9]], start=2), made([[0]], start=3)]
    assert parts[0].completions == ["w5", "w6"]
    whole = Rollout.join(parts)
    assert whole.completion_ids.tolist() == [[5, 0, 1], [6, 1, 1], [7, 8, 9], [0, 1, 1]]
    assert whole.completion_mask.int().tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 0, 0]]
    assert whole.completion_mask.dtype == torch.bool
    assert whole.mask.tolist()[3] == [0, 1, 1, 0, 0]
    assert whole.logps.tolist() == [[-5, 0, 0], [-6, 0, 0], [-7, -8, -9], [0, 0, 0]]
    assert whole.prompts == ["w2", "w3", "w4", "w5"]
    assert whole.completions == ["w5", "w6", "w7 w8 w9", ""]
    assert whole.columns == {"label": [0, 1, 2, 3], "note": ["n0", "n1", "n2", "n3"]}
    assert whole.ended.tolist() == [True, False, False, True]


def test_joining_undoes_taking_apart() -> None:
    whole = roll(make_policy())
    parts = [whole.select(rows) for rows in torch.arange(len(whole.ids)).chunk(4)]
    again = Rollout.join(parts)
    for name in ("ids", "mask", "logps", "completion_ids", "completion_mask", "prompt_ids", "prompt_mask"):
        assert torch.equal(getattr(again, name), getattr(whole, name))
    assert again.completions == whole.completions


def test_columns_are_passed_on() -> None:
    columns = {"label": [1, 0, 1]}
    ids, mask = make_prompts().values()
    assert Sampler(max_new_tokens=2)(make_policy(), ids, mask, columns).columns == columns


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
    assert not rollout.logps.requires_grad
    with pytest.raises((RuntimeError, ValueError, IndexError)):  # a failure restores it, too
        Sampler()(policy, torch.full((1, 2), VOCABULARY + 5), torch.ones(1, 2, dtype=torch.int64))
    assert policy.base.generation_config is own
    assert {name: module.training for name, module in policy.named_modules()} == modes


def test_the_seed_decides() -> None:
    policy = make_policy()
    assert torch.equal(roll(policy, 1).completion_ids, roll(policy, 1).completion_ids)
    assert not torch.equal(roll(policy, 1).completion_ids, roll(policy, 2).completion_ids)


def test_a_model_without_end_runs_to_the_limit() -> None:
    tokenizer = make_tokenizer()
    policy = Policy.from_model(make_model(), tokenizer)
    policy.base.generation_config.eos_token_id = None
    tokenizer.eos_token = None
    rollout = roll(policy)
    assert policy.eos_ids == []
    assert rollout.completion_mask.all()
    assert not rollout.ended.any()


def test_sampled_tokens_stay_in_the_support() -> None:
    """Another kernel may round a sampled token out of the top-k set; its log-probability must stay finite."""
    logits = torch.tensor([[[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]]])
    tokens = torch.tensor([[2, 2]])
    found = Sampler(top_k=2).logits(logits, [0], tokens)
    assert found.tolist() == [[[3.0, 2.0, 1.0], [-torch.inf, 2.0, 3.0]]]


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"min_new_tokens": -1},
        {"min_new_tokens": 9, "max_new_tokens": 8},
        {"temperature": 0.0},
        {"temperature": -1.0},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"temperature": float("nan")},
    ],
    ids=str,
)
def test_arguments_that_cannot_work_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        Sampler(**wrong)


class Fed:
    """Rows and tokens of each forward pass."""

    def __init__(self, policy: Policy) -> None:
        self.shapes: list[tuple[int, ...]] = []
        policy.base.register_forward_pre_hook(
            lambda module, args, kwargs: self.shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
        )


def test_prompts_in_a_row_are_read_once() -> None:
    policy = make_policy()
    fed = Fed(policy)
    ids, mask = (value.repeat_interleave(4, 0) for value in make_prompts().values())
    Sampler(max_new_tokens=2)(policy, ids, mask)
    rows, width = ids.shape
    assert fed.shapes == [(rows // 4, width - 1), (rows, 1), (rows, 1)]


def test_ended_completions_leave_the_batch() -> None:
    """With blocks of one token each completion is fed as many tokens as it has, but the last."""
    policy = make_policy()
    fed = Fed(policy)
    rollout = roll(policy, block=1, max_new_tokens=20)
    lengths = rollout.lengths.tolist()
    assert len(set(lengths)) > 2
    assert [rows for rows, _ in fed.shapes[1:]] == [sum(length > t for length in lengths) for t in range(max(lengths))]


def test_a_prompt_of_one_token() -> None:
    policy = make_policy()
    ids = torch.tensor([[5], [5], [7]])
    rollout = Sampler(max_new_tokens=4, min_new_tokens=2)(policy, ids, torch.ones_like(ids))
    truth = teacher_forced(rollout, "gpt2", Sampler(max_new_tokens=4, min_new_tokens=2))
    torch.testing.assert_close(rollout.logps, truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_static_cache_changes_nothing(name: str) -> None:
    dynamic, static = (roll(make_policy(name), static_cache=static, block=99) for static in (False, True))
    assert torch.equal(dynamic.completion_ids, static.completion_ids)
    torch.testing.assert_close(dynamic.logps, static.logps, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [{"static_cache": True}, {}, {"block": 1}], ids=str)
def test_sampling_stops_where_all_have_ended(settings: dict[str, Any]) -> None:
    rollout = roll(make_policy(), seed=3, max_new_tokens=50, repeat=1, **settings)
    assert rollout.ended.all()
    assert rollout.completion_ids.shape[1] == rollout.lengths.max() < 50


def test_steps_that_are_undone_leave_no_logps() -> None:
    """On a GPU transformers looks for ends a step late, and takes back what came after them."""
    torch.manual_seed(0)
    recorder, ids, scores = _Recorder(Sampler(), [0], 1), torch.tensor([[3], [4]]), torch.randn(4, 2, 6)
    for step in scores:
        ids = torch.cat([ids, recorder(ids, step).argmax(-1, keepdim=True)], dim=1)
    whole = scores.log_softmax(-1).amax(-1).T
    torch.testing.assert_close(recorder.logps(ids[:, :-1], 3), whole[:, :3])
    torch.testing.assert_close(recorder.logps(ids, 4), whole)
