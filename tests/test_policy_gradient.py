"""Windows of completions in a real Trainer: steps, denominators, ratios, checkpoints, abstentions, configuration."""

import itertools
import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler, ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

import grade_lightning.methods
from grade_lightning.data import Source, TextDataModule
from grade_lightning.errors import InputError
from grade_lightning.functional.sequences import token_logps
from grade_lightning.kl import KL
from grade_lightning.methods import DAPO, GRPO, GSPO, PPO, RLOO, DrGRPO, Reinforce, ReinforcePlusPlus
from grade_lightning.policies import LoRA, Policy
from grade_lightning.policy_gradient import PolicyExperience, PolicyGradientModule
from grade_lightning.rewards import FunctionReward, Reward
from grade_lightning.rollouts import Rollout, Sampler
from tests.conftest import VOCABULARY, make_model, make_prompts, make_tokenizer
from tests.methods.test_contract import Toy, assert_same, trainer, weights

METHODS: list[type[PolicyGradientModule]] = [
    value
    for value in vars(grade_lightning.methods).values()
    if isinstance(value, type) and issubclass(value, PolicyGradientModule)
]
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)


@pytest.fixture(autouse=True)
def _own_random_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


class Prescribed(Sampler):
    """Gives the completions that stand in the column `completions`, G for each prompt, as if it had sampled them."""

    calls = 0

    @torch.no_grad()
    def __call__(
        self, policy: Policy, input_ids: Tensor, attention_mask: Tensor, columns: dict[str, list[Any]] | None = None
    ) -> Rollout:
        assert columns is not None
        self.calls += 1
        rows = [given[i % len(given)] for i, given in enumerate(columns["completions"])]
        lengths = torch.tensor([len(row) for row in rows])
        ids = torch.full((len(rows), int(lengths.max())), 1)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
        mask = torch.arange(ids.shape[1]) < lengths.unsqueeze(1)
        rollout = Rollout(input_ids, attention_mask, ids, mask, torch.zeros(ids.shape), policy.tokenizer, columns, [0])
        with policy.evaluating():
            logits = policy(policy.embed(rollout.ids[:, :-1]), rollout.mask[:, :-1], ids.shape[1])
        logps = token_logps(self.logits(logits, [0], ids).log_softmax(-1), ids)
        return replace(rollout, logps=logps.masked_fill(~mask, 0))


class Numbered(Sampler):
    """Numbers the completions of each window, from 0, and counts the windows."""

    calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Rollout:
        self.calls += 1
        rollout = super().__call__(*args, **kwargs)
        return replace(rollout, columns={"number": list(range(len(rollout.ids)))})


class Watch(Callback):
    """Of each visit the rows and what was logged; of each optimizer step the gradient, learning rate and weights."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = []
        self.logged: list[dict[str, float]] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.rates: list[float] = []
        self.before: list[dict[str, Tensor]] = []
        self.stepped_after: list[int] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        grads = {name: p.grad for name, p in pl_module.named_parameters() if p.grad is not None}
        self.gradients.append({name: grad.clone() for name, grad in grads.items()})
        self.rates.append(optimizer.param_groups[0]["lr"])
        self.before.append(own_weights(pl_module))
        self.stepped_after.append(len(self.rows))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.rows.append(pl_module.last_rollout[0].columns.get("number", []))
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def own_weights(module: PolicyGradientModule) -> dict[str, Tensor]:
    """Each once: GPT-2's table has two names."""
    return {name: value for name, value in weights(module).items() if "lm_head" not in name}


def constant(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


def build(
    method: type[PolicyGradientModule], dtype: torch.dtype = torch.float64, lr: float = 0.05, **kwargs: Any
) -> PolicyGradientModule:
    """A method on a small GPT-2 that reads its completions from the data; it is trained by plain gradient descent."""
    settings: dict[str, Any] = {
        "reward": Toy(),
        "sampler": Prescribed(max_new_tokens=12),
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=lr),
        "lr_scheduler": constant,
    }
    policy = Policy.from_model(make_model("gpt2", dtype, scale=4.0), make_tokenizer())
    module = method(policy=policy, **settings | kwargs)
    module.configure_model()
    return module


def plain(method: type[PolicyGradientModule], **kwargs: Any) -> dict[str, Any]:
    """Settings with which a window is one step: no minibatches, epochs or other prompts to fall back on."""
    settings: dict[str, Any] = {"epochs": 1, "minibatches": 1, "num_generations": 4}
    return settings | ({"max_retries": 0} if method is DAPO else {}) | kwargs


def prompts(count: int, size: int = 4, seed: int = 0, shortest: int = 1) -> dict[str, Any]:
    """Prompts with `size` completions each: the first are short, the last long."""
    generator = torch.Generator().manual_seed(seed)
    batch = {name: x.repeat(-(-count // 3), 1)[:count] for name, x in make_prompts().items()}
    lengths = torch.linspace(shortest, 12, count * size).long().tolist()
    rows = [torch.randint(2, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    groups = [rows[i : i + size] for i in range(0, len(rows), size)]
    return batch | {"columns": {"completions": groups}}


def loader(*windows: dict[str, Any], visits: int = 1) -> DataLoader[Any]:
    """Each window as often as it is visited."""
    rows: Any = [window for window in windows for _ in range(visits)]
    return DataLoader(rows, batch_size=None)


def run(module: PolicyGradientModule, *windows: dict[str, Any], **kwargs: Any) -> Watch:
    watch = Watch()
    visits = module.epochs * module.minibatches * kwargs.get("accumulate_grad_batches", 1)
    callbacks = [watch, *kwargs.pop("callbacks", [])]
    trainer(callbacks=callbacks, log_every_n_steps=1, **kwargs).fit(module, loader(*windows, visits=visits))
    return watch


def flat(values: dict[str, Tensor]) -> Tensor:
    return torch.cat([values[name].flatten().double() for name in sorted(values)])


def distance(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    """Relative to the size of both, which must not be nothing."""
    assert one.keys() == two.keys()
    size = float(flat(two).norm())
    assert size > 1e-4
    return float((flat(one) - flat(two)).norm()) / size


class Lines(Source):
    """Prompts of two or three words."""

    def load(self) -> DatasetDict:
        rows = [f"w{2 + i % 17} w{2 + i // 17}" + " w5" * (i % 2) for i in range(80)]
        return DatasetDict(train=Dataset.from_dict({"prompt": rows}))


def data(batch_size: int, **kwargs: Any) -> TextDataModule:
    sizes: dict[str, Any] = {"prompt_size": 48, "val_size": 4, "test_size": 4, "max_prompt_tokens": 6}
    return TextDataModule(Lines(), batch_size, **sizes | kwargs)


# ---- steps of a Trainer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("steps", [12, 8])
def test_max_steps_counts_optimizer_steps_and_an_epoch_of_a_window_is_every_completion_once(
    accumulate: int, steps: int
) -> None:
    """Six optimizer steps for each rollout: two rollouts for twelve, and two for eight, which end in mid-window."""
    sampler, watch = Numbered(max_new_tokens=4), Watch()
    module = build(GRPO, torch.float32, sampler=sampler, num_generations=2, epochs=3, minibatches=2)
    settings: dict[str, Any] = {"accumulate_grad_batches": accumulate, "limit_val_batches": 0}
    fitted = trainer(max_steps=steps, max_epochs=-1, callbacks=[watch], **settings)
    fitted.fit(module, datamodule=data(batch_size=4))

    assert fitted.global_step == len(watch.gradients) == steps
    assert watch.stepped_after == [accumulate * (step + 1) - 1 for step in range(steps)]  # after whole accumulations
    assert sampler.calls == 2
    assert {len(rows) for rows in watch.rows} == {4}
    size, parts = 8 * accumulate, 2 * accumulate
    epochs = [list(itertools.chain(*watch.rows[i : i + parts])) for i in range(0, len(watch.rows), parts)]
    assert len(epochs) == steps // 2
    assert [sorted(epoch) for epoch in epochs] == [list(range(size))] * len(epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)  # each in an order of its own
    assert list(range(size)) not in epochs


def test_one_minibatch_is_not_shuffled() -> None:
    sampler = Numbered(max_new_tokens=4)
    module = build(PPO, torch.float32, sampler=sampler, epochs=3)
    fitted = trainer(max_steps=6, callbacks=[watch := Watch()], limit_val_batches=0)
    fitted.fit(module, datamodule=data(batch_size=4))
    assert sampler.calls == 2
    assert watch.rows == [[0, 1, 2, 3]] * 6


@pytest.mark.parametrize("minibatches", [1, 3])
def test_micro_batches_of_a_step_are_of_similar_length(minibatches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every completion once in each epoch, sorted by length within an optimizer step but not over steps."""
    torch.manual_seed(0)
    module = build(PPO, torch.float32, epochs=2, minibatches=minibatches)
    monkeypatch.setattr(module, "_accumulation", lambda: 2)
    lengths = torch.randperm(24) + 1
    plan = module._plan_steps(torch.arange(24) < lengths.unsqueeze(1))
    assert len(plan) == module.visits == 4 * minibatches
    for epoch in (plan[: 2 * minibatches], plan[2 * minibatches :]):
        assert sorted(torch.cat([rows for rows, _ in epoch]).tolist()) == list(range(24))
        for (short, totals), (long, same) in zip(epoch[::2], epoch[1::2], strict=True):
            assert lengths[short].max() < lengths[long].min()
            assert totals == same
            assert totals.tokens == lengths[torch.cat([short, long])].sum() / 2
        if minibatches > 1:
            assert lengths[epoch[0][0]].max() > lengths[epoch[2][0]].min()


def test_the_epoch_of_the_data_ends_with_a_whole_window() -> None:
    """Four windows of twelve prompts in the 48 rows, six visits each: the fifth rollout is of the second epoch."""
    sampler = Numbered(max_new_tokens=4)
    module = build(ReinforcePlusPlus, torch.float32, sampler=sampler, epochs=3, minibatches=2)
    fitted = trainer(max_epochs=2, callbacks=[watch := Watch()], limit_val_batches=0)
    fitted.fit(module, datamodule=data(batch_size=6))
    assert fitted.global_step == len(watch.rows) == 2 * 4 * 6
    assert sampler.calls == 8


@pytest.mark.parametrize("accumulate", [1, 2])
def test_clipping_bounds_the_change_of_each_optimizer_step(accumulate: int) -> None:
    """Gradient descent with rate 1 moves by the gradient itself, which is far longer than the bound."""
    bound = 1e-3
    module = build(GRPO, lr=1.0, num_generations=4, epochs=2, kl=KL())
    watch = run(
        module,
        prompts(4 * accumulate),
        prompts(4 * accumulate, seed=1),
        accumulate_grad_batches=accumulate,
        gradient_clip_val=bound,
    )
    states = [flat(state) for state in (*watch.before, own_weights(module))]
    lengths = [float((new - old).norm()) for old, new in itertools.pairwise(states)]
    assert len(lengths) == 4
    assert len(watch.rows) == 4 * accumulate
    assert lengths == pytest.approx([bound] * 4, rel=1e-2)
    free = run(build(GRPO, lr=1.0, num_generations=4, epochs=2, kl=KL()), prompts(4))
    assert float(flat(free.gradients[0]).norm()) > 10 * bound


@pytest.mark.parametrize("name", ["PPO", "GRPO", "RLOO"])
def test_bfloat16_mixed_precision_has_the_gradient_of_float32(name: str) -> None:
    """Sampling and measuring run without gradients in the same autocast; what they leave behind must not cut any."""
    method = getattr(grade_lightning.methods, name)
    found = []
    for precision in ("bf16-mixed", "32-true"):
        module = build(method, torch.float32, num_generations=4, epochs=2)
        found.append(run(module, prompts(4), precision=precision))
        assert all(p.dtype == torch.float32 and p.isfinite().all() for p in module.parameters())
    half, full = found
    for one, two in zip(half.gradients, full.gradients, strict=True):
        assert one.keys() == two.keys()
        assert torch.cosine_similarity(flat(one), flat(two), dim=0) > 0.98
        assert [key for key, gradient in one.items() if not gradient.any()] == []


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_learning_rate_falls_once_for_each_optimizer_step(accumulate: int) -> None:
    """The default: a straight line to zero over all optimizer steps, visits included."""
    module = build(GRPO, lr=0.6, num_generations=4, epochs=3, lr_scheduler=None)
    windows = [prompts(2 * accumulate, seed=seed) for seed in range(2)]
    watch = run(module, *windows, accumulate_grad_batches=accumulate)
    assert watch.rates == pytest.approx([0.6, 0.5, 0.4, 0.3, 0.2, 0.1])


def test_validation_in_the_middle_of_a_window_changes_nothing() -> None:
    class Validated(Callback):
        def __init__(self) -> None:
            self.steps: list[int] = []

        def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
            self.steps.append(trainer.global_step)

    found = []
    for limit in (0, 1):
        module = build(PPO, torch.float32, sampler=Sampler(max_new_tokens=5), epochs=4)
        settings: dict[str, Any] = {"limit_val_batches": limit, "num_sanity_val_steps": 0, "val_check_interval": 3}
        fitted = trainer(max_steps=8, callbacks=[validated := Validated()], **settings)
        fitted.fit(module, datamodule=data(batch_size=4))
        found.append(weights(module))
        assert validated.steps == ([3, 6] if limit else [])
        assert ("val/reward" in fitted.callback_metrics) is bool(limit)
    assert_same(*found)


# ---- denominators ---------------------------------------------------------------------------------------------------

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

    class Local(DAPO):
        def aggregate(self, mask: Tensor, totals: Any) -> Tensor:
            return mask.double() / mask.sum()

    ours, truth = (run(build(m, **plain(DAPO)), prompts(4), accumulate_grad_batches=4) for m in (Local, DAPO))
    assert distance(ours.gradients[0], truth.gradients[0]) > 0.1


# ---- on-policy ------------------------------------------------------------------------------------------------------


def move(module: PolicyGradientModule) -> None:
    """Away from the reference; the check of the first batch is for runs that begin at it."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.policy.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    module._fresh = False


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
    experience = two.explore(window)
    assert experience.old is not None
    assert experience.advantages is not None
    two.loss(experience).loss.backward()
    truth = {name: p.grad for name, p in two.named_parameters() if p.grad is not None}
    assert distance(found.gradients[0], truth) < 1e-9


# ---- off-policy -----------------------------------------------------------------------------------------------------


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


class Keep(Callback):
    """The window as it is while it is trained on."""

    window: PolicyExperience

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        if pl_module._window is not None:
            self.window = pl_module._window


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


# ---- checkpoints ----------------------------------------------------------------------------------------------------

RESUMED: dict[str, tuple[type[PolicyGradientModule], dict[str, Any], int]] = {
    "PPO": (PPO, {"epochs": 4, "kl": KL(0.1, target=0.05, horizon=16)}, 1),
    "GRPO": (GRPO, {"epochs": 2, "minibatches": 2, "num_generations": 2}, 1),
    "GRPO, accumulated": (GRPO, {"epochs": 2, "minibatches": 2, "num_generations": 2}, 2),
    "GSPO, with the default schedule": (GSPO, {"minibatches": 4, "num_generations": 2, "lr_scheduler": None}, 1),
    "Reinforce": (Reinforce, {"epochs": 2, "minibatches": 2}, 1),
}


def checkpointed(folder: Path, name: str, **kwargs: Any) -> tuple[PolicyGradientModule, Trainer, Watch]:
    """Eight steps, a checkpoint after each; or the rest of them from `ckpt_path` on."""
    method, settings, accumulate = RESUMED[name]
    adam: dict[str, Any] = {"optimizer": lambda parameters: torch.optim.Adam(parameters, lr=1e-2)}
    module = build(method, torch.float32, sampler=Sampler(max_new_tokens=5), **adam | settings | kwargs)
    watch = Watch()
    save = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    callbacks = [watch, save] if not folder.exists() else [watch]
    fitted = trainer(
        max_steps=8,
        max_epochs=3,
        callbacks=callbacks,
        enable_checkpointing=not folder.exists(),
        log_every_n_steps=1,
        accumulate_grad_batches=accumulate,
    )
    return module, fitted, watch


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_resumed_in_the_middle_of_a_window_is_the_run(name: str, tmp_path: Path) -> None:
    """With the real data, a fresh module and nothing but weights in the file: the same bits, and nothing sampled."""
    folder = tmp_path / "run"
    whole, fitted, watch = checkpointed(folder, name)
    fitted.fit(whole, datamodule=data(batch_size=8))
    assert fitted.global_step == 8
    for step in (1, 3, 4, 5):
        path = folder / f"step={step}.ckpt"
        content = torch.load(path, weights_only=True)["grade_lightning"]
        assert [window is None for window in content["windows"]] == [step % 4 == 0]
        module, again, seen = checkpointed(folder, name)
        torch.manual_seed(99)
        again.fit(module, datamodule=data(batch_size=8), ckpt_path=path, weights_only=True)
        assert_same(weights(module), weights(whole))
        assert module.running == whole.running
        assert module.beta == whole.beta
        assert again.global_step == 8
        for one, two in zip(seen.logged, watch.logged[-len(seen.logged) :], strict=True):
            assert {k: v for k, v in one.items() if "tok" not in k} == pytest.approx(
                {k: v for k, v in two.items() if "tok" not in k}, rel=0, abs=0, nan_ok=True
            )


def test_what_runs_from_window_to_window_is_in_the_checkpoint(tmp_path: Path) -> None:
    for name, key in (("PPO", "beta"), ("Reinforce", "baseline")):
        folder = tmp_path / name
        module, fitted, _ = checkpointed(folder, name)
        fitted.fit(module, datamodule=data(batch_size=8))
        saved = [
            torch.load(folder / f"step={step}.ckpt", weights_only=True)["grade_lightning"]["running"]
            for step in (3, 4, 8)
        ]
        assert saved[0] == {}
        assert saved[1][key] != saved[2][key] == module.running[key]


@pytest.mark.parametrize("kl", [KL(0.1, target=0.05, horizon=16), KL(0.1)], ids=["adaptive", "fixed"])
def test_a_fixed_beta_of_the_user_is_not_taken_from_a_checkpoint(kl: KL, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    module, fitted, _ = checkpointed(folder, "PPO", kl=kl)
    fitted.fit(module, datamodule=data(batch_size=8))
    assert (module.beta == 0.1) is (kl.target is None)
    again, rest, seen = checkpointed(folder, "PPO", kl=KL(0.3))
    rest.fit(again, datamodule=data(batch_size=8), ckpt_path=folder / "step=4.ckpt", weights_only=True)
    assert again.beta == 0.3
    assert [line["train/beta"] for line in seen.logged] == [pytest.approx(0.3)] * 4


@pytest.mark.parametrize("epochs", [1, 2, 6])
def test_a_window_of_another_plan_is_not_gone_on_with(epochs: int, tmp_path: Path) -> None:
    """The window was planned for four steps; who resumes with other `epochs` begins a new one."""
    folder = tmp_path / "run"
    module, fitted, _ = checkpointed(folder, "PPO")
    fitted.fit(module, datamodule=data(batch_size=8))
    again, rest, seen = checkpointed(folder, "PPO", epochs=epochs)
    rest.fit(again, datamodule=data(batch_size=8), ckpt_path=folder / "step=3.ckpt", weights_only=True)
    assert rest.global_step == 8
    assert all(torch.tensor(line["train/loss"]).isfinite() for line in seen.logged)


def test_a_checkpoint_of_a_step_that_failed_can_be_resumed(tmp_path: Path) -> None:
    """Lightning saves one on an exception; a window that was never measured is of no use in it."""

    class Breaks(Reinforce):
        def after_window(self, window: PolicyExperience, kl: Tensor) -> None:
            raise KeyError

    module = build(Breaks)
    fitted = trainer()
    with pytest.raises(KeyError):
        fitted.fit(module, loader(prompts(4, 1)))
    fitted.save_checkpoint(tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    content["grade_lightning"]["method"] = "Reinforce"
    torch.save(content, tmp_path / "a.ckpt")
    again = build(Reinforce)
    trainer(max_epochs=2).fit(again, loader(prompts(4, 1)), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert again.trainer.global_step > 0


# ---- rewards that abstain -------------------------------------------------------------------------------------------


class Choosy(Reward):
    """Toy's reward; abstains where the completion begins with an even token, and on all completions of long prompts."""

    def forward(self, rollout: Rollout) -> Tensor:
        abstains = (rollout.completion_ids[:, 0] % 2 == 0) | rollout.prompt_mask.bool().all(-1)
        return Toy().score(rollout).total.masked_fill(abstains, torch.nan)


class Silent(Reward):
    """Abstains always."""

    def forward(self, rollout: Rollout) -> Tensor:
        return torch.full((len(rollout.ids),), torch.nan)


def begun(window: dict[str, Any], other: bool = False) -> dict[str, Any]:
    """Every second completion begins with an even token; `other`: where Choosy abstains, the rest is another text."""
    groups = []
    for mask, group in zip(window["attention_mask"], window["columns"]["completions"], strict=True):
        rows = [[4 + (j + 1) % 2, *row[1:]] for j, row in enumerate(group)]
        abstains = [bool(mask.all()) or row[0] == 4 for row in rows]
        if other:
            changed = [[row[0], *(2 + (token + 5) % 17 for token in row[1:])] for row in rows]
            rows = [new if abstain else row for new, row, abstain in zip(changed, rows, abstains, strict=True)]
        groups.append(rows)
    return window | {"columns": {"completions": groups}}


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
    assert all(value == value for value in module.running.values())


# ---- configuration --------------------------------------------------------------------------------------------------


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
        "--model.reward.function=tests.test_policy_gradient.ones",
        "--data.source=LocalFiles",
        f"--data.source.train={folder / 'prompts.csv'}",
        *(f"--data.{name}={value}" for name, value in sizes.items()),
        *(f"--trainer.{setting}" for setting in quiet),
        *args,
    ]


def test_one_argument_of_the_kl_leaves_the_methods_other_defaults(folder: Path) -> None:
    config = import_module("grade_lightning_cli.config")
    for method, args, expected in (
        ("PPO", ["--model.kl.beta=0.2"], KL(0.2)),
        ("PPO", ["--model.kl.estimator=k3", "--model.kl.placement=loss"], KL(0.05, "k3", "loss")),
        ("GRPO", ["--model.kl.beta=0.2"], KL(0.2, "k3", "loss")),
        ("RLOO", ["--model.kl.target=3", "--model.kl.horizon=50"], KL(0.05, clock="sequence", target=3, horizon=50)),
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


def test_a_window_must_divide_evenly() -> None:
    module = build(ReinforcePlusPlus, minibatches=4)
    with pytest.raises(InputError, match="6 completions cannot be divided evenly into 4 parts"):
        run(module, prompts(6, 1))


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
    rollout = module.sample(make_prompts())[0]
    torch.testing.assert_close(module.measure(rollout).logps, module.measure(rollout).logps)
    with module.policy.evaluating():
        still = module.measure(rollout).logps
    torch.testing.assert_close(module.measure(rollout).logps, still)


def test_groups_of_one_are_refused() -> None:
    for method in (RLOO, GRPO, GSPO):
        with pytest.raises(InputError, match="compares the completions of a prompt"):
            method(num_generations=1)


def test_a_window_must_not_change_its_size() -> None:
    module = build(PPO)
    callback = GradientAccumulationScheduler({0: 1, 1: 2})
    with pytest.raises(InputError, match="accumulate_grad_batches"):
        trainer(callbacks=[callback]).fit(module, loader(prompts(4)))


def test_a_window_that_is_cut_short_is_named() -> None:
    with pytest.warns(UserWarning, match="no multiple of the 2 that are trained on what is read or sampled at once"):
        trainer(limit_train_batches=3).fit(build(PPO, epochs=2), loader(prompts(4), prompts(4), visits=2))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*no multiple of.*")
        trainer().fit(build(PPO, epochs=2), loader(prompts(4), prompts(4), visits=2))
