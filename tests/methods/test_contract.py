"""What every method owes: one contract over all of them, by a real Trainer on a toy task."""

import itertools
import json
import re
import traceback
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

import grade_lightning.methods
from grade_lightning.errors import InputError
from grade_lightning.methods import RLOO, Grade, GradeSTE, ZerothOrder
from grade_lightning.modules import AlignmentModule, PolicyGradientModule
from grade_lightning.policies import Policy
from grade_lightning.records import Rollout
from grade_lightning.rewards import FunctionReward
from grade_lightning.rollouts import Sampler
from grade_lightning.terms import PolicyLoss
from tests.conftest import make_model, make_prompts, make_tokenizer, mostly_slow
from tests.methods.toy_task import (
    CORE,
    METHODS,
    SCALE,
    Recorder,
    Toy,
    assert_same,
    assert_the_reward_rises,
    batches,
    each_method,
    every_method,
    fit,
    full_and_lora,
    make,
    some_methods,
    trained_names,
    trainer,
    weights,
    with_and_without_lora,
)

METRICS = (
    "reward reward_std reward_ci95 kl kl_per_token entropy response_length eos_rate distinct_2 perplexity rewards/Toy"
)


class Waits(TorchDispatchMode):
    """Keeps operations of ours after which a program waits for its device: numbers read, shapes that depend on values.

    transformers looks at the attention mask; seeds are drawn by the processor.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []
        self.seeds: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, result = func.overloadpacket.__name__, func(*args, **kwargs or {})
        if name == "randint":
            self.seeds.append(result)
        indexed = args[1] if name == "index" else []
        waits = name in ("_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2")
        waits |= any(x is not None and x.dtype == torch.bool for x in indexed)
        files = [frame.filename for frame in traceback.extract_stack()]
        if (
            waits
            and args[0].data_ptr() not in [seed.data_ptr() for seed in self.seeds]
            and not any("masking_utils" in f for f in files)
        ):
            self.found.append(name)
        return result


pytestmark = pytest.mark.usefixtures("own_random_state")


def test_methods_are_found() -> None:
    assert "GradeSTE" in {method.__name__ for method in METHODS}


@cache
def eight_steps(method: type[AlignmentModule], lora: bool) -> tuple[AlignmentModule, dict[str, torch.Tensor], Recorder]:
    """A module that was trained, with the weights that it began with."""
    module = make(method, lora)
    module.configure_model()
    start = weights(module)
    if isinstance(module, ZerothOrder):
        module.epsilon = 1e-5  # its completions are of the policy's neighbours
    return module, start, fit(module, steps=8)


@full_and_lora((method.__name__ for method in METHODS), CORE)
def test_every_trained_parameter_gets_a_gradient(method: type[AlignmentModule], lora: bool) -> None:
    """A of LoRA has none where B is zero, at the very first step; afterwards everything that is trained has one.

    With a trial before each step both are taken from there.
    """
    module, start, run = eight_steps(method, lora)
    first, later = ([0, 1], 2) if module.redraws else ([0], 1)
    if method is ZerothOrder:  # a difference of two rewards: of all weights, or 0 where both draw the same tokens
        assert all(found in (set(), trained_names(module)) for found in run.without_gradient)
        assert set() in run.without_gradient
    else:
        for step in first:
            assert run.without_gradient[step] == {name for name in trained_names(module) if ".lora_A" in name}
        assert not any(run.without_gradient[later:])
    assert [name for name, value in module.state_dict().items() if torch.equal(value, start[name])] == []
    assert abs(run.steps[0]["train/kl"]) < 1e-3


@full_and_lora(["GradeSTE", "DPO"], ["PPO"])
def test_the_reward_rises(method: type[AlignmentModule], lora: bool) -> None:
    run = assert_the_reward_rises(method, lora)
    assert run.steps[-1]["train/kl"] > 0.1


@each_method
def test_what_is_logged_in_training_is_documented(method: type[AlignmentModule]) -> None:
    """And no more than that, where docs/metrics.md says who logs what."""
    module, _, run = eight_steps(method, False)
    called = {method.__name__}
    if isinstance(module, PolicyGradientModule):
        first = module.terms[0]
        assert isinstance(first, PolicyLoss)
        called |= {"policy gradients"} | ({"policy gradients that clip"} if first.clips else set())
        called |= {"policy gradients with groups"} if module.num_generations > 1 else set()
    documented = set()
    for line in (Path(__file__).parents[2] / "docs" / "metrics.md").read_text().splitlines():
        if line.startswith("| `"):
            names, unit, _, *who = (cell.strip() for cell in line.strip("|").split("|"))
            if unit not in ("text", "histogram") and (not who or called & set(who[0].split(", "))):
                documented |= set(re.findall(r"`([^`]+)`", names))
    expected = {name.replace("{stage}", "train").replace("{name}", "Toy") for name in documented if "{val" not in name}
    assert set(run.steps[-1]) - {"reward", "kl", "tok/s"} == expected


STEPS = [{"epochs": 4, "minibatches": 1}, {"epochs": 2, "minibatches": 2}]


@pytest.mark.parametrize("name", ["PPO", pytest.param("GRPO", marks=pytest.mark.slow)])
@pytest.mark.parametrize("steps", mostly_slow(STEPS, STEPS[1]), ids=str)
def test_the_reward_rises_with_four_steps_for_each_rollout(name: str, steps: dict[str, Any]) -> None:
    run = assert_the_reward_rises(getattr(grade_lightning.methods, name), settings=steps)
    assert max(step["train/clip_fraction"] for step in run.steps) > 0


@every_method
def test_the_seed_decides(method: type[AlignmentModule]) -> None:
    runs = []
    for seed in (3, 3, 4):
        module = make(method, seed=seed)
        runs.append((fit(module, steps=2).steps, weights(module)))
    keys = [name for name in runs[0][0][0] if "tokens_per_second" not in name and "tok/s" not in name]
    assert "train/loss" in keys
    for one, two in zip(runs[0][0], runs[1][0], strict=True):
        assert [one[name] for name in keys] == pytest.approx([two[name] for name in keys], rel=0, abs=0, nan_ok=True)
    assert_same(runs[0][1], runs[1][1])
    assert runs[0][0][-1]["train/loss"] != runs[2][0][-1]["train/loss"]


@full_and_lora(CORE, ["GradeSTE", "PPO"])
def test_a_resumed_run_is_the_run(method: type[AlignmentModule], lora: bool, tmp_path: Path) -> None:
    """Two epochs at once, and one epoch, a checkpoint, a new module, and the other epoch: the same bits."""
    whole = make(method, lora)
    fit(whole, 2, max_epochs=2)

    half, first = make(method, lora), trainer()
    first.fit(half, batches(2))
    first.save_checkpoint(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=False)["state_dict"]
    assert_same(saved, weights(half))
    assert set(saved) == trained_names(half)

    resumed = make(method, lora, seed=9)
    seed_everything(0, verbose=False)
    trainer(max_epochs=2).fit(resumed, batches(2), ckpt_path=tmp_path / "half.ckpt")
    assert_same(weights(resumed), weights(whole))
    assert [name for name, v in weights(resumed).items() if torch.equal(v, saved[name])] == []


@every_method
def test_checkpoints_that_do_not_fit_are_named(method: type[AlignmentModule], tmp_path: Path) -> None:
    module, run, path = make(method), trainer(max_steps=1), tmp_path / "a.ckpt"
    run.fit(module, batches(1))
    run.save_checkpoint(path)
    with pytest.raises(InputError, match=r"weights do not fit.*LoRA"):
        trainer().fit(make(method, lora=True), batches(1), ckpt_path=path)

    content = torch.load(path, weights_only=False)
    assert content["grade_lightning"]["method"] == method.__name__
    torch.save(content | {"grade_lightning": {"method": "SomethingElse"}}, path)
    with pytest.raises(InputError, match=rf"SomethingElse.*{method.__name__}"):
        trainer().fit(make(method), batches(1), ckpt_path=path)
    del content["grade_lightning"]
    torch.save(content, path)
    with pytest.raises(InputError, match=rf"not of grade_lightning.*{method.__name__}"):
        trainer().fit(make(method), batches(1), ckpt_path=path)


@every_method
@with_and_without_lora
def test_bfloat16_mixed_precision(method: type[AlignmentModule], lora: bool) -> None:
    module = make(method, lora)
    steps = fit(module, 3, precision="bf16-mixed").steps
    assert all(torch.tensor(step["train/loss"]).isfinite() for step in steps)
    assert all(value.isfinite().all() and value.dtype == torch.float32 for value in module.state_dict().values())


@some_methods
def test_gradient_accumulation(method: type[AlignmentModule]) -> None:
    """One optimizer step for four batches, each with its own noise."""
    module = make(method)
    run = trainer(accumulate_grad_batches=4, callbacks=[recorder := Recorder()], log_every_n_steps=1)
    run.fit(module, batches(4))
    assert run.global_step == 1
    assert len({step["train/entropy"] for step in recorder.steps}) == 4


@every_method
def test_gradient_clipping(method: type[AlignmentModule]) -> None:
    fit(make(method), 2, gradient_clip_val=0.5)


@some_methods
@pytest.mark.parametrize("stage", ["val", "test"])
def test_evaluation(method: type[AlignmentModule], stage: str) -> None:
    """Its metrics, their values where they are known, and the same noise each time."""
    module = make(method)
    measure = trainer().validate if stage == "val" else trainer().test
    (found,) = measure(module, batches(2), verbose=False)
    assert set(found) == {f"{stage}/{name}" for name in METRICS.split()}
    assert found[f"{stage}/kl"] == pytest.approx(0, abs=1e-5)
    assert found[f"{stage}/reward"] == pytest.approx(found[f"{stage}/rewards/Toy"])
    assert 0 < found[f"{stage}/distinct_2"] <= 1
    assert 1 <= found[f"{stage}/response_length"] <= 6
    (again,) = measure(module, batches(2), verbose=False)
    assert again == found


@some_methods
def test_evaluation_against_a_plain_loop(method: type[AlignmentModule]) -> None:
    """Padding, ends and unequal batches: means over completions, or over tokens, of all batches together."""
    module = make(method)
    rows: Any = [next(iter(batches(1, n))) for n in (1, 5)]
    loader: DataLoader[Any] = DataLoader(rows, batch_size=None)
    (found,) = trainer().validate(module, loader, verbose=False)
    module.configure_model()
    rewards, nll, lengths = [], 0.0, []
    bigrams: list[tuple[int, int]] = []
    for index, batch in enumerate(loader):
        rollout: Rollout = module.evaluate(batch, "val", index).rollout
        model = make_model("llama", scale=SCALE).eval()
        for row in range(len(rollout.ids)):
            prompt = rollout.prompt_ids[row][rollout.prompt_mask[row].bool()].tolist()
            tokens = rollout.completion_ids[row][rollout.completion_mask[row]].tolist()
            with torch.no_grad():
                logps = model(input_ids=torch.tensor([prompt + tokens])).logits[0].log_softmax(-1)
            nll -= sum(float(logps[len(prompt) + t - 1, token]) for t, token in enumerate(tokens))
            rewards.append(sum(token > 9 for token in prompt + tokens) / len(prompt + tokens))
            bigrams += itertools.pairwise(tokens)
            lengths.append(len(tokens))
    assert len(rewards) == 18
    values = torch.tensor(rewards)
    assert found["val/reward"] == pytest.approx(float(values.mean()), rel=1e-5)
    assert found["val/reward_std"] == pytest.approx(float(values.std()), rel=1e-5)
    assert found["val/reward_ci95"] == pytest.approx(1.96 * float(values.std()) / 18**0.5, rel=1e-5)
    assert found["val/response_length"] == pytest.approx(sum(lengths) / 18)
    assert found["val/distinct_2"] == pytest.approx(len(set(bigrams)) / len(bigrams))
    assert found["val/perplexity"] == pytest.approx(float(torch.tensor(nll / sum(lengths)).exp()), rel=1e-4)


@some_methods
def test_validation_does_not_change_training(method: type[AlignmentModule]) -> None:
    runs = []
    for limit in (0, 1):
        module = make(method)
        trainer(max_epochs=2, limit_val_batches=limit, num_sanity_val_steps=limit).fit(module, batches(2), batches(1))
        runs.append(weights(module))
    assert_same(*runs)


@some_methods
def test_predictions(method: type[AlignmentModule]) -> None:
    module = make(method)
    found = trainer().predict(module, batches(1, repeat=1))
    assert found is not None
    (rows,) = found
    assert len(rows) == 3
    for row in rows:
        assert isinstance(row, dict)
        assert set(row) == {"prompt", "completion", "reward", "kl", "rewards", "length", "ended", "ref_nll"}
        words = (row["prompt"] + " " + row["completion"]).split()
        assert all(word in make_tokenizer().get_vocab() for word in words)
        assert row["rewards"] == {"Toy": row["reward"]}


@some_methods
def test_judges_are_measured_and_not_trained_on(method: type[AlignmentModule]) -> None:
    def judge(completions: list[str], **_: Any) -> list[float | None]:
        return [None, *(float(len(text)) for text in completions[1:])]

    plain, judged = make(method), make(method, judges=[FunctionReward(judge)])
    fit(plain, 2)
    fit(judged, 2)
    assert_same(weights(plain), weights(judged))
    (found,) = trainer().validate(judged, batches(1), verbose=False)
    assert found["val/rewards/judge"] > 1


class Half(Toy):
    """A judge of the reward's own name that gives half of it."""

    @property
    def name(self) -> str:
        return "Toy"

    def score_embeddings(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        return super().score_embeddings(embeddings, mask) / 2


@every_method
def test_a_judge_of_the_same_name_does_not_hide_the_reward(method: type[AlignmentModule]) -> None:
    """Two ClassifierRewards are both called `classifier`: reward and judge must both be logged."""
    (found,) = trainer().validate(make(method, judges=[Half()]), batches(1), verbose=False)
    assert found["val/rewards/Toy"] == pytest.approx(found["val/reward"])
    others = [value for name, value in found.items() if name.startswith("val/rewards/") and name != "val/rewards/Toy"]
    assert others == [pytest.approx(found["val/reward"] / 2)]


@every_method
def test_saved_policy_is_loaded_as_a_policy(method: type[AlignmentModule], tmp_path: Path) -> None:
    module = make(method, lora=True)
    fit(module, 2)
    module.save_pretrained(str(tmp_path))
    again = Policy(str(tmp_path))
    again.load()
    ids, mask = make_prompts().values()
    one, two = (policy.eval()(policy.embed(ids), mask, 2) for policy in (module.policy, again))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


# ---- honesty at the first batch -----------------------------------------------------------------------------------


@every_method
@with_and_without_lora
def test_a_reference_that_is_not_the_start_is_noticed(method: type[AlignmentModule], lora: bool) -> None:
    module = make(method, lora)
    with torch.no_grad():
        for parameter in module.policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2)
    with pytest.raises(InputError, match="reference is not the model that the policy started as"):
        fit(module, 1)


class Liar(Sampler):
    """Samples from another distribution than the one that it states."""

    def __call__(self, *args: Any, **kwargs: Any) -> Rollout:
        rollout = super().__call__(*args, **kwargs)
        assert rollout.engine_logps is not None
        return replace(rollout, engine_logps=rollout.engine_logps - 0.3)


@pytest.mark.parametrize(
    "method",
    mostly_slow([m for m in METHODS if m is not Grade], GradeSTE, RLOO),  # Grade draws by itself
    ids=lambda method: method.__name__,
)
def test_completions_that_another_policy_sampled_are_noticed(method: type[AlignmentModule]) -> None:
    with pytest.raises(InputError, match="not sampled from the policy"):
        fit(make(method, sampler=Liar(max_new_tokens=6)), 1)


@every_method
@pytest.mark.parametrize("settings", [{"temperature": 0.7}, {"top_k": 5, "top_p": 0.9}, {"min_new_tokens": 3}], ids=str)
def test_honest_samplers_pass(method: type[AlignmentModule], settings: dict[str, Any]) -> None:
    fit(make(method, sampler=Sampler(max_new_tokens=6, **settings)), 1)


@every_method
def test_completions_must_fit_into_the_context(method: type[AlignmentModule]) -> None:
    module = make(method, sampler=Sampler(max_new_tokens=40))
    module.policy.base.config.max_position_embeddings = 64
    with pytest.raises(InputError, match=r"64 tokens.*30.*40"):
        module.check_lengths(prompt=30, text=20)
    module.policy.base.config.max_position_embeddings = 70
    module.check_lengths(prompt=30, text=20)


@some_methods
def test_the_training_pass_waits_for_no_device(method: type[AlignmentModule]) -> None:
    """Between the rollout and the optimizer nothing is read back: no `.item()`, no shape that depends on values."""
    module = make(method)
    module.configure_model()
    experience = module.collect(next(iter(batches())))
    with Waits() as waits:
        loss = module.loss(experience).loss
        loss.backward()
    assert waits.found == []
    with waits:
        float(loss.detach())
    assert waits.found == ["_local_scalar_dense"]


@some_methods
def test_logging_a_step_waits_for_no_device(method: type[AlignmentModule], monkeypatch: pytest.MonkeyPatch) -> None:
    module, found = make(method), list[list[str]]()
    finish = module.finish_step

    def watched(*args: Any) -> Tensor:
        with Waits() as waits:
            loss = finish(*args)
        found.append(waits.found)
        return loss

    monkeypatch.setattr(module, "finish_step", watched)
    trainer(limit_val_batches=0).fit(module, batches(3))
    assert found == [[], [], []]
    with Waits() as waits:
        torch.ones(1).item()
    assert waits.found != []


@pytest.mark.parametrize(
    ("method", "phases"),
    [
        pytest.param(
            GradeSTE, {"sampling", "reward", "policy", "reference", "hops", "vocabulary"}, marks=pytest.mark.slow
        ),
        pytest.param(RLOO, {"sampling", "reward", "policy", "reference", "vocabulary"}, marks=pytest.mark.slow),
        pytest.param(Grade, {"sampling", "reward", "reference"}, marks=pytest.mark.slow),
    ],
)
def test_a_profiler_sees_the_phases(method: type[AlignmentModule], phases: set[str], tmp_path: Path) -> None:
    """As `--trainer.profiler pytorch` writes them: a trace that TensorBoard and Perfetto open."""
    run = trainer(profiler="pytorch", logger=CSVLogger(tmp_path), max_steps=6, limit_val_batches=0)
    run.fit(make(method), batches(6))
    (trace,) = tmp_path.rglob("*.pt.trace.json")
    assert phases <= {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
