"""The line of stages of every policy gradient: denominators, ratios, abstentions, configuration."""

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor

import grade_lightning.methods
from grade_lightning.errors import InputError
from grade_lightning.functional.aggregation import Normalizers
from grade_lightning.kl import KL
from grade_lightning.methods import DAPO, GRPO, GSPO, PPO, RLOO, DrGRPO, Reinforce, ReinforcePlusPlus
from grade_lightning.modules import PolicyGradientModule
from grade_lightning.policies import LoRA, Policy
from grade_lightning.records import Prompts, Rollout
from grade_lightning.rewards import FunctionReward, Reward
from grade_lightning.rollouts import Sampler
from grade_lightning.terms import PolicyLoss
from tests.conftest import make_model, make_prompts, make_tokenizer
from tests.methods.toy_task import Toy, assert_same, weights
from tests.modules.toys import (
    Choosy,
    Keep,
    begun,
    build,
    distance,
    every_method,
    flat,
    move,
    plain,
    prompts,
    run,
    states,
)

pytestmark = pytest.mark.usefixtures("own_random_state")


# ---- denominators

ACCUMULATED: list[tuple[type[PolicyGradientModule], dict[str, Any]]] = [
    (GRPO, {}),
    (GRPO, {"scale_rewards": "batch", "kl": KL(0.1, "full", "loss", "sequence")}),
    (GRPO, {"minibatches": 2}),
    (DAPO, {}),
    (DAPO, {"minibatches": 2}),
    (DrGRPO, {}),
    (RLOO, {}),
    (Reinforce, {}),
    (ReinforcePlusPlus, {}),
    (PPO, {}),
]


@pytest.mark.parametrize(("method", "settings"), ACCUMULATED, ids=lambda x: getattr(x, "__name__", str(x)))
def test_four_micro_batches_have_the_gradient_of_one_batch(
    method: type[PolicyGradientModule], settings: dict[str, Any]
) -> None:
    """The same sixteen completions per optimizer step, of 1 to 12 tokens, sorted: means of means would differ much."""
    settings = plain(method, **settings)
    count = 4 * settings["minibatches"]
    windows = [prompts(count, seed=seed) for seed in range(2 // settings["minibatches"])]  # later shuffles differ
    found = [run(build(method, **settings), *windows, accumulate_grad_batches=n) for n in (4, 1)]
    many, one = found
    assert len(many.gradients) == len(one.gradients) == 2
    assert len(many.logged) == 4 * len(one.logged)
    for ours, truth in zip(many.gradients, one.gradients, strict=True):
        assert distance(ours, truth) < 1e-6


def test_means_of_means_would_be_noticed() -> None:
    """The completions above, with each micro-batch divided by its own tokens: the gradient is another one."""

    def local(mask: Tensor, normalizers: Normalizers) -> Tensor:
        return mask.double() / mask.sum()

    wrong, right = (build(DAPO, **plain(DAPO)) for _ in range(2))
    line = wrong.terms[0]
    assert isinstance(line, PolicyLoss)
    line.aggregate = local
    ours, truth = (run(module, prompts(4), accumulate_grad_batches=4) for module in (wrong, right))
    assert distance(ours.gradients[0], truth.gradients[0]) > 0.1


# ---- on-policy


@every_method
def test_one_pass_has_the_gradient_of_measuring_first(method: type[PolicyGradientModule]) -> None:
    """A window that is used once is measured by its training pass alone."""
    one, two = (build(method, **plain(method)) for _ in range(2))
    move(one)
    move(two)
    window = prompts(4)
    found = run(one, window)
    assert found.logged[0]["train/kl"] > 0.05
    assert found.logged[0].get("train/clip_fraction", 0) == 0

    two.epochs = 2  # so that it measures first
    experience = two.collect(window)
    assert experience.old is not None
    assert experience.advantages is not None
    two.loss(experience).loss.backward()
    truth = {name: p.grad for name, p in two.named_parameters() if p.grad is not None}
    assert distance(found.gradients[0], truth) < 1e-9


# ---- off-policy


def logps_by_hand(state: dict[str, Tensor], rollout: Rollout) -> tuple[torch.nn.Module, list[Tensor]]:
    """Of each completion by itself, without padding, through the plain model of transformers."""
    model: Any = make_model("gpt2", torch.float64)
    own = {name.removeprefix("policy.model."): x for name, x in state.items() if name.startswith("policy.model.")}
    model.load_state_dict(own, strict=False)  # the head is the table
    model.eval()
    found = []
    for row in range(len(rollout.ids)):
        ids = rollout.ids[row][rollout.mask[row].bool()].unsqueeze(0)
        length = int(rollout.lengths[row])
        logits = model(input_ids=ids).logits[0, -length - 1 : -1]
        found.append(logits.log_softmax(-1).gather(-1, ids[0, -length:, None]).squeeze(-1))
    return model, found


@pytest.mark.parametrize("beta", [0.0, 0.2], ids=["", "KL in the loss"])
@pytest.mark.parametrize("name", ["GRPO", "DAPO", "GSPO", "CISPO"])
def test_the_second_epoch_is_trained_on_the_clipped_ratio_to_the_policy_that_sampled(name: str, beta: float) -> None:
    """Surrogates as the papers write them, by automatic differentiation, from the weights of both epochs."""
    bounds = {"GRPO": (0.9, 1.1), "DAPO": (0.9, 1.15), "GSPO": (0.99, 1.02), "CISPO": (0.0, 1.1)}[name]
    low, high = bounds
    settings: dict[str, Any] = {
        "GRPO": {"epsilon": 0.1},
        "DAPO": {"epsilon_low": 0.1, "epsilon_high": 0.15, "max_retries": 0, "overlong_buffer": 0},
        "GSPO": {"epsilon_low": 0.01, "epsilon_high": 0.02},
        "CISPO": {"low": 0.0, "high": 1.1},
    }[name]
    method = getattr(grade_lightning.methods, name)
    module = build(method, lr=0.3, num_generations=4, epochs=2, minibatches=1, kl=KL(beta, "k3", "loss"), **settings)
    start = weights(module)
    watch = run(module, prompts(4), callbacks=[keep := Keep()])
    rollout = keep.window.rollout

    rewards = Toy().score(rollout).total.double().unflatten(0, (-1, 4))
    centred = rewards - rewards.mean(-1, keepdim=True)
    advantages = (centred / (rewards.std(-1, keepdim=True) + 1e-4)).flatten()
    assert keep.window.advantages is not None
    torch.testing.assert_close(keep.window.advantages[:, 0].double(), advantages, rtol=1e-4, atol=1e-5)

    with torch.no_grad():
        _, reference = logps_by_hand(start, rollout)
        _, old = logps_by_hand(watch.before[0], rollout)
    model, new = logps_by_hand(watch.before[1], rollout)
    terms, beyond = [], 0
    for before, now, a in zip(old, new, advantages.unbind(), strict=True):
        if name == "CISPO":
            capped = (now.detach() - before).exp().clamp(low, high)
            terms.append(capped * a * now)
            beyond += int((capped == high).sum())
            continue
        ratio = (now - before).exp()
        if name == "GSPO":
            ratio = (now - before).mean().exp().expand_as(now)
        terms.append(torch.minimum(ratio * a, ratio.clamp(low, high) * a))
        beyond += int((((a > 0) & (ratio > high)) | ((a < 0) & (ratio < low))).sum())
    for i, (now, other) in enumerate(zip(new, reference, strict=True)):
        terms[i] = terms[i] - beta * ((other - now).exp() - 1 - (other - now))
    tokens = sum(len(term) for term in terms)
    over_sequences = name in ("GRPO", "GSPO")
    loss = -sum((t.mean() / len(terms) if over_sequences else t.sum() / tokens for t in terms), torch.zeros(()))
    loss.backward()
    truth = {f"policy.model.{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert distance(watch.gradients[1], truth) < 1e-4  # advantages are those of float32 rewards
    assert 0 < beyond < tokens
    assert watch.logged[1]["train/clip_fraction"] == pytest.approx(beyond / tokens, rel=1e-6)
    assert watch.logged[0]["train/clip_fraction"] == 0


# ---- rewards that abstain


class Silent(Reward):
    """Abstains always."""

    def forward(self, rollout: Rollout) -> Tensor:
        return torch.full((len(rollout.ids),), torch.nan)


@every_method
def test_a_completion_without_a_reward_has_no_gradient_and_is_in_no_statistic(
    method: type[PolicyGradientModule],
) -> None:
    """Other tokens in it, as many: the same gradient in both epochs. One prompt of three has no reward at all."""
    found = []
    for other in (False, True):
        module = build(method, **plain(method, epochs=2, kl=KL(0.2)), reward=Choosy())
        move(module)
        found.append(run(module, begun(prompts(6, shortest=4), other)))
    for one, two in zip(found[0].gradients, found[1].gradients, strict=True):
        assert flat(one).isfinite().all()
        assert distance(one, two) < 1e-6
    assert found[0].logged[0]["train/kl"] != found[1].logged[0]["train/kl"]  # the completions did change
    assert found[0].logged[0]["train/reward"] == found[1].logged[0]["train/reward"]


@every_method
def test_a_window_without_any_reward_is_survived(method: type[PolicyGradientModule]) -> None:
    """Nothing is learnt from it, and the next window is none the worse for it."""
    module = build(method, **plain(method, epochs=2, kl=KL(0.2)), reward=Silent())
    move(module)
    start = weights(module)
    first = run(module, prompts(6))
    assert all(torch.tensor(line["train/loss"]).isfinite() for line in first.logged)
    assert not any(flat(gradients).any() for gradients in first.gradients)
    assert_same(weights(module), start)
    module.reward = Toy()
    then = run(module, prompts(6))
    assert all(flat(gradients).isfinite().all() for gradients in then.gradients)
    assert float(flat(then.gradients[0]).norm()) > 1e-3
    remembered = [torch.as_tensor(value) for state in states(module).values() for value in state.values()]
    assert not any(value.isnan().any() for value in remembered)


# ---- configuration


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small policy and a table of prompts, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    make_model().save_pretrained(tmp_path / "policy")
    make_tokenizer().save_pretrained(tmp_path / "policy")
    lines = [f"w{2 + i % 17} w{2 + i // 17}" for i in range(60)]
    (tmp_path / "prompts.csv").write_text("\n".join(["prompt", *lines]) + "\n")
    return tmp_path


def ones(completions: list[str], **_: Any) -> list[float | None]:
    return [1.0] * len(completions)


def arguments(folder: Path, method: str, *args: str) -> list[str]:
    quiet = ("logger=false", "accelerator=cpu", "enable_progress_bar=false", "enable_checkpointing=false")
    sizes = {"prompt_size": 20, "val_size": 4, "test_size": 4, "batch_size": 10, "max_prompt_tokens": 4}
    return [
        f"--model={method}",
        f"--model.policy.path={folder / 'policy'}",
        "--model.reward=FunctionReward",
        "--model.reward.function=tests.modules.test_policy_gradient.ones",
        "--data.source=LocalFiles",
        f"--data.source.train={folder / 'prompts.csv'}",
        *(f"--data.{name}={value}" for name, value in sizes.items()),
        *(f"--trainer.{setting}" for setting in quiet),
        *args,
    ]


@every_method
def test_what_a_method_fixes_is_no_option(method: type[PolicyGradientModule]) -> None:
    """Of the command line; what it leaves open is one."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(method, "model", sub_configs=True)
    options = {action.dest.split(".")[1] for action in parser._actions if "." in action.dest}
    assert not options & {"advantage", "level", "gate", "aggregate", "clips"}
    assert {"policy", "reward", "sampler", "kl", "terms", "num_generations"} <= options


@pytest.mark.slow
def test_one_argument_of_the_kl_leaves_the_methods_other_defaults(folder: Path) -> None:
    config = import_module("grade_lightning_cli.config")
    for method, args, expected in (
        ("PPO", ["--model.kl.beta=0.2"], KL(0.2)),
        ("PPO", ["--model.kl.estimator=k3", "--model.kl.placement=loss"], KL(0.05, "k3", "loss")),
        ("GRPO", ["--model.kl.beta=0.2"], KL(0.2, "k3", "loss")),
        ("RLOO", ["--model.kl.target=3", "--model.kl.horizon=50"], KL(0.05, credit="sequence", target=3, horizon=50)),
        ("DAPO", ["--model.kl.beta=0.3"], KL(0.3)),
        ("GSPO", [], KL()),
    ):
        module = config.build(arguments(folder, method, *args)).model
        assert type(module).__name__ == method
        assert module.kl == expected
        assert module.beta == expected.beta
        assert isinstance(module.reward, FunctionReward)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), r"data\.batch_size: 10 completions .* model\.num_generations \(8\); change one of them"),
        (("--trainer.accumulate_grad_batches=2", "--model.minibatches=2"), r"data\.batch_size: 40 completions"),
        (("--model.epochs=0",), r"epochs = 0: must be 1 or more"),
        (("--model.kl.beta=-1",), r"kl\.beta = -1"),
        (("--model.kl.estimator=k4",), r"--model\.kl\.estimator"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_one_line(
    args: tuple[str, ...], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = import_module("grade_lightning_cli.main")
    if "--model.minibatches=2" in args:  # 40 is a multiple of 8, but not of 16
        args = (*args, "--model.num_generations=16")
    with pytest.raises(SystemExit) as left:
        main.fit(arguments(folder, "GRPO", "--trainer.max_steps=1", "--trainer.limit_val_batches=0", *args))
    assert left.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert re.search(message, line)


@pytest.mark.parametrize("name", ["num_generations", "epochs", "minibatches"])
def test_numbers_below_one_are_named(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} = 0"):
        build(RLOO, torch.float64, 0.1, **{name: 0})


def test_dropout_of_adapters_leaves_the_ratio_alone() -> None:
    """The completions are measured without dropout, and so they are trained."""
    policy = Policy.from_model(make_model("gpt2"), make_tokenizer(), LoRA(r=4, dropout=0.5))
    module = GSPO(policy=policy, reward=Toy(), sampler=Sampler(max_new_tokens=6), minibatches=1)
    module.configure_model()
    with torch.no_grad():
        for name, parameter in module.policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    module.train()
    rollout = module.sample(Prompts.of(make_prompts())).rollout
    torch.testing.assert_close(module.measure(rollout).logps, module.measure(rollout).logps)
    with module.policy.evaluating():
        still = module.measure(rollout).logps
    torch.testing.assert_close(module.measure(rollout).logps, still)


def test_groups_of_one_are_refused() -> None:
    for method in (RLOO, GRPO, GSPO):
        with pytest.raises(InputError, match="compares the completions of a prompt"):
            method(num_generations=1)
