"""vLLM in the process: where it is installed it is really run, and elsewhere its absence is one line."""

import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from grade_lightning.callbacks import Checkpoint
from grade_lightning.errors import InputError
from grade_lightning.methods import GradeSTE
from grade_lightning.policies import LoRA, Policy
from grade_lightning.records import Prompts, Rollout
from grade_lightning.rollouts import Distribution, Sampler, VLLMEngine
from grade_lightning.rollouts.vllm import handed_over, sampling_settings
from tests.conftest import CONFIGS, VOCABULARY, make_model, make_prompts, make_tokenizer
from tests.methods.toy_task import assert_same, batches, make, trainer, weights
from tests.rollouts.agreement import assert_agrees_over_a_resume, assert_follows_the_distribution, gap, run
from tests.rollouts.rolling import SETTINGS, assert_mixed, logps_of

_SETTINGS = {name: settings for name, settings in SETTINGS.items() if name not in ("blocks", "static cache")}


@pytest.fixture
def heads_of_32(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Llama that vLLM's kernels take."""
    sizes: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 24}
    make_config = lambda: LlamaConfig(  # noqa: E731
        vocab_size=VOCABULARY, num_hidden_layers=2, num_key_value_heads=1, tie_word_embeddings=False, **sizes
    )
    monkeypatch.setitem(CONFIGS, "llama", make_config)


def tiny_policy(lora: bool = False) -> Policy:
    return Policy.from_model(make_model("llama", scale=4.0), make_tokenizer(), LoRA(r=2, dropout=0.0) if lora else None)


def draw(policy: Policy, engine: VLLMEngine, seed: int = 0, **settings: Any) -> Rollout:
    torch.manual_seed(seed)
    prompts = Prompts.of(make_prompts()).repeat(torch.full((3,), 4))
    return Sampler(**{"max_new_tokens": 8} | settings, engine=engine)(policy, prompts)


def shaken(policy: Policy) -> None:
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.mark.slow
@pytest.mark.usefixtures("heads_of_32")
class TestWithVLLM:
    """One engine for all: a process has room for one."""

    @pytest.fixture(autouse=True)
    def installed(self) -> None:
        pytest.importorskip("vllm")

    @pytest.fixture(scope="class")
    def engine(self) -> VLLMEngine:
        pytest.importorskip("vllm")
        return VLLMEngine(kv_cache_gb=0.1, max_length=64)

    def test_it_may_be_built_while_a_run_validates(self, engine: VLLMEngine) -> None:
        """The first of all tests: there the engine is built."""
        policy = tiny_policy()
        with torch.inference_mode():
            draw(policy, engine)
        shaken(policy)
        assert gap(policy, Distribution(max_new_tokens=8), draw(policy, engine)) < 2e-5

    @pytest.mark.parametrize("settings", _SETTINGS.values(), ids=_SETTINGS)
    def test_logps_are_the_learners(self, engine: VLLMEngine, settings: dict[str, Any]) -> None:
        policy = tiny_policy()
        rollout = draw(policy, engine, **settings)
        assert gap(policy, Distribution(**{"max_new_tokens": 8} | settings), rollout) < 2e-5
        assert (logps_of(rollout)[~rollout.completion_mask] == 0).all()
        if not settings:
            assert_mixed(rollout)

    @pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
    def test_it_never_samples_from_old_weights(self, engine: VLLMEngine, lora: bool) -> None:
        policy = tiny_policy(lora)
        before = draw(policy, engine)
        shaken(policy)
        after = draw(policy, engine)
        assert gap(policy, Distribution(max_new_tokens=8), after) < 2e-5
        assert gap(policy, Distribution(max_new_tokens=8), before) > 1e-3

    @pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
    def test_it_samples_the_policy_that_learns_also_after_a_resume(
        self, engine: VLLMEngine, lora: bool, tmp_path: Path
    ) -> None:
        assert_agrees_over_a_resume(lambda: engine, tmp_path, lora, updates=20)

    def test_a_run_without_the_hand_over_is_off(self, engine: VLLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        real = VLLMEngine.sync
        calls: list[int] = []

        def once(self: VLLMEngine, policy: Policy, step: int) -> None:
            if not calls:
                real(self, policy, step)
            calls.append(step)

        monkeypatch.setattr(VLLMEngine, "sync", once)
        seen = run(engine, 2)
        assert calls == [0, 1, 2, 3]
        assert seen.gaps[0] < 2e-5
        assert min(seen.gaps[1:]) > 1e-4

    def test_samples_follow_the_distribution(self, engine: VLLMEngine) -> None:
        assert_follows_the_distribution(engine, tiny_policy(), Prompts.of(make_prompts()))

    def test_the_seed_decides_and_nothing_else_of_the_process_changes(self, engine: VLLMEngine) -> None:
        policy = tiny_policy()
        one, following = draw(policy, engine, seed=1), torch.rand(3)
        threads = torch.get_num_threads()
        assert torch.equal(one.completion_ids, draw(policy, engine, seed=1).completion_ids)
        assert torch.equal(torch.rand(3), following)
        assert not torch.equal(one.completion_ids, draw(policy, engine, seed=2).completion_ids)
        assert torch.get_num_threads() == threads
        assert "vllm" not in torch.set_num_threads.__module__

    def test_what_vllm_refuses_is_one_line(self, engine: VLLMEngine) -> None:
        strange = Prompts(torch.full((1, 4), VOCABULARY + 5), torch.ones(1, 4))
        with pytest.raises(InputError, match=r"VLLMEngine failed in the middle of a rollout \(.*resumes") as caught:
            Sampler(max_new_tokens=20, engine=engine)(tiny_policy(), strange)
        assert "\n" not in str(caught.value)

    def test_prompts_that_are_too_long_are_named(self, engine: VLLMEngine) -> None:
        with pytest.raises(InputError, match=r"max_new_tokens = 20 has 80 tokens, but there is room for 64; raise"):
            Sampler(max_new_tokens=20, engine=engine)(tiny_policy(), Prompts(torch.full((1, 60), 5), torch.ones(1, 60)))


class Fake:
    """Answers as vLLM does, with token 5 until it has said enough; `fault` happens in the call of that number."""

    def __init__(self, fault: Callable[[list[Any]], list[Any]], call: int) -> None:
        self.fault, self.call, self.calls = fault, call, 0
        self.model_config = SimpleNamespace(max_model_len=64)

    def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
        assert method == "reload_weights"
        assert not torch.is_inference_mode_enabled()
        self.weights = dict(kwargs["weights_iterator"])

    def reset_prefix_cache(self) -> None:
        return

    def generate(self, prompts: list[Any], settings: list[dict[str, Any]], use_tqdm: bool) -> list[Any]:
        self.calls += 1
        plain = make_model("llama").eval()
        plain.load_state_dict(self.weights)
        found = []
        for prompt, asked in zip(prompts, settings, strict=True):
            ids, count = prompt["prompt_token_ids"], asked["max_tokens"]
            with torch.no_grad():
                logits = plain(torch.tensor([ids + [5] * count])).logits[0, len(ids) - 1 : -1]
            logps = logits.log_softmax(-1)[:, 5].tolist()
            said = SimpleNamespace(token_ids=[5] * count, logprobs=[{5: SimpleNamespace(logprob=x)} for x in logps])
            found.append(SimpleNamespace(outputs=[said]))
        return self.fault(found) if self.calls == self.call else found


def dies(answers: list[Any]) -> list[Any]:
    raise RuntimeError("EngineCore\nhas died")


def has_no_memory(answers: list[Any]) -> list[Any]:
    raise torch.OutOfMemoryError("tried to allocate 1 GiB")


def says_something_else(answers: list[Any]) -> list[Any]:
    answers[0].outputs[0].token_ids = [VOCABULARY] * 6
    answers[0].outputs[0].logprobs = [{VOCABULARY: SimpleNamespace(logprob=-1.0)}] * 6
    return answers


@pytest.fixture
def fake_package(monkeypatch: pytest.MonkeyPatch) -> None:
    package = ModuleType("vllm")
    package.__spec__ = ModuleSpec("vllm", None)
    package.SamplingParams = dict  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", package)


def faulty(fault: Callable[[list[Any]], list[Any]], call: int) -> VLLMEngine:
    engine = VLLMEngine()
    engine._engine = Fake(fault, call)
    return engine


@pytest.mark.usefixtures("fake_package")
def test_weights_are_handed_over_outside_of_inference_mode() -> None:
    with torch.inference_mode():
        draw(tiny_policy(), faulty(lambda answers: answers, 99))


@pytest.mark.usefixtures("fake_package")
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (has_no_memory, r"OutOfMemoryError: .*; lower --model\.sampler\.engine\.kv_cache_gb"),
        (lambda answers: answers[:-1], r"11 completions for 12 prompts"),
        (says_something_else, rf"completion 0 has token {VOCABULARY}"),
    ],
)
def test_a_fault_is_one_line(fault: Any, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        draw(tiny_policy(), faulty(fault, 1), max_new_tokens=6)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("fake_package")
def test_a_run_whose_engine_died_resumes(tmp_path: Path) -> None:
    """It dies in the third step; the weights are those after the second, and the run goes on from there."""

    def module(call: int) -> Any:
        return make(GradeSTE, sampler=Sampler(6, engine=faulty(dies, call)))

    whole, broken, resumed = module(99), module(3), module(99)
    trainer(max_epochs=2).fit(whole, batches(2))
    keeping = trainer(max_epochs=2, enable_checkpointing=True, callbacks=[Checkpoint(tmp_path, every_n_train_steps=2)])
    with pytest.raises(InputError, match=r"middle of a rollout \(RuntimeError: EngineCore has died\)"):
        keeping.fit(broken, batches(2))
    (last,) = tmp_path.glob("*.ckpt")
    assert_same(torch.load(last, weights_only=False)["state_dict"], weights(broken))
    trainer(max_epochs=2).fit(resumed, batches(2), ckpt_path=last)
    assert_same(weights(resumed), weights(whole))


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="it is installed")
def test_a_missing_vllm_is_one_line() -> None:
    with pytest.raises(InputError, match=r"pip install 'grade-lightning\[vllm\]'"):
        VLLMEngine()


def test_a_temperature_that_vllm_would_raise_is_refused() -> None:
    with pytest.raises(InputError, match=r"sampler\.temperature = 0\.005"):
        sampling_settings(Distribution(temperature=0.005), [0])


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_weights_that_are_handed_over_are_the_policys(lora: bool) -> None:
    """Under the names of a plain model, in which they give the same logits; the policy's own stay as they are."""
    policy = make(GradeSTE, lora).policy
    shaken(policy)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    plain = make_model("llama")
    plain.load_state_dict(handed_over(policy))
    ids: Any = make_prompts()["input_ids"]
    with torch.no_grad(), policy.evaluating() as model:
        torch.testing.assert_close(plain.eval()(ids).logits, model(ids).logits)
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())
    assert not any(value.requires_grad for value in handed_over(policy).values())
