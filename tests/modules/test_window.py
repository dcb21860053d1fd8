"""Windows of completions: which step trains on which rows, what is counted, and how a window is resumed."""

import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler, ModelCheckpoint

import grade_lightning.methods
from grade_lightning.distributed import Reduce
from grade_lightning.errors import InputError
from grade_lightning.kl import KL
from grade_lightning.methods import GRPO, GSPO, PPO, Reinforce, ReinforcePlusPlus
from grade_lightning.modules import PolicyGradientModule
from grade_lightning.modules.window import plan_steps
from grade_lightning.records import Batching, Experience, Rollout, Scores
from grade_lightning.rollouts import Sampler
from tests.conftest import make_tokenizer, mostly_slow
from tests.methods.toy_task import assert_same, trainer, weights
from tests.modules.toys import (
    Numbered,
    Watch,
    build,
    data,
    distance,
    flat,
    loader,
    own_weights,
    prompts,
    run,
    states,
)

pytestmark = pytest.mark.usefixtures("own_random_state")


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("steps", mostly_slow([12, 8], 8))
def test_max_steps_counts_optimizer_steps_and_an_epoch_of_a_window_is_every_completion_once(
    accumulate: int, steps: int
) -> None:
    """Six optimizer steps for each rollout: two rollouts for twelve, and two for eight, which end in mid-window."""
    engine, watch = Numbered(), Watch()
    module = build(GRPO, torch.float32, sampler=Sampler(4, engine=engine), num_generations=2, epochs=3, minibatches=2)
    settings: dict[str, Any] = {"accumulate_grad_batches": accumulate, "limit_val_batches": 0}
    fitted = trainer(max_steps=steps, max_epochs=-1, callbacks=[watch], **settings)
    fitted.fit(module, datamodule=data(batch_size=4))

    assert fitted.global_step == len(watch.gradients) == steps
    assert watch.stepped_after == [accumulate * (step + 1) - 1 for step in range(steps)]  # after whole accumulations
    assert engine.calls == 2
    assert {len(rows) for rows in watch.rows} == {4}
    size, parts = 8 * accumulate, 2 * accumulate
    epochs = [list(itertools.chain(*watch.rows[i : i + parts])) for i in range(0, len(watch.rows), parts)]
    assert len(epochs) == steps // 2
    assert [sorted(epoch) for epoch in epochs] == [list(range(size))] * len(epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)  # each in an order of its own
    assert list(range(size)) not in epochs


def test_one_minibatch_is_not_shuffled() -> None:
    engine = Numbered()
    module = build(PPO, torch.float32, sampler=Sampler(4, engine=engine), epochs=3)
    fitted = trainer(max_steps=6, callbacks=[watch := Watch()], limit_val_batches=0)
    fitted.fit(module, datamodule=data(batch_size=4))
    assert engine.calls == 2
    assert watch.rows == [[0, 1, 2, 3]] * 6


@pytest.mark.parametrize("minibatches", [1, 3])
def test_micro_batches_of_a_step_are_of_similar_length(minibatches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every completion once in each epoch, sorted by length within an optimizer step but not over steps."""
    torch.manual_seed(0)
    module = build(PPO, torch.float32, epochs=2, minibatches=minibatches)
    monkeypatch.setattr(module, "accumulation", lambda: 2)
    lengths = torch.randperm(24) + 1
    ids, mask = torch.ones(24, 24, dtype=torch.long), torch.arange(24) < lengths.unsqueeze(1)
    rollout = Rollout(ids, ids, ids, mask, None, module.tokenizer)
    plan = plan_steps(Experience(rollout, Scores(torch.zeros(24), {})), module.batching, Reduce().mean)
    assert len(plan) == module.batching.steps_per_batch == 4 * minibatches
    for epoch in (plan[: 2 * minibatches], plan[2 * minibatches :]):
        assert sorted(torch.cat([rows for rows, _ in epoch]).tolist()) == list(range(24))
        for (short, totals), (long, same) in zip(epoch[::2], epoch[1::2], strict=True):
            assert lengths[short].max() < lengths[long].min()
            assert totals == same
            assert totals.tokens == lengths[torch.cat([short, long])].sum() / 2
        if minibatches > 1:
            assert lengths[epoch[0][0]].max() > lengths[epoch[2][0]].min()


@pytest.mark.slow
def test_the_epoch_of_the_data_ends_with_a_whole_window() -> None:
    """Four windows of twelve prompts in the 48 rows, six visits each: the fifth rollout is of the second epoch."""
    engine = Numbered()
    module = build(ReinforcePlusPlus, torch.float32, sampler=Sampler(4, engine=engine), epochs=3, minibatches=2)
    fitted = trainer(max_epochs=2, callbacks=[watch := Watch()], limit_val_batches=0)
    fitted.fit(module, datamodule=data(batch_size=6))
    assert fitted.global_step == len(watch.rows) == 2 * 4 * 6
    assert engine.calls == 8


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


def test_a_window_must_divide_evenly() -> None:
    module = build(ReinforcePlusPlus, minibatches=4)
    with pytest.raises(InputError, match="6 completions cannot be divided evenly into 4 parts"):
        run(module, prompts(6, 1))


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


# ---- checkpoints

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


@pytest.mark.parametrize(
    "name", [name if name == "PPO" else pytest.param(name, marks=pytest.mark.slow) for name in RESUMED]
)
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
        assert states(module) == states(whole)
        assert module.beta == whole.beta
        assert again.global_step == 8
        for one, two in zip(seen.logged, watch.logged[-len(seen.logged) :], strict=True):
            assert {k: v for k, v in one.items() if "tok" not in k} == pytest.approx(
                {k: v for k, v in two.items() if "tok" not in k}, rel=0, abs=0, nan_ok=True
            )


@pytest.mark.slow
def test_what_runs_from_window_to_window_is_in_the_checkpoint(tmp_path: Path) -> None:
    for name, part, key in (
        ("PPO", "kl", "beta"),
        ("PPO", "advantage", "average"),
        ("Reinforce", "advantage", "average"),
    ):
        folder = tmp_path / f"{name}-{part}"
        module, fitted, _ = checkpointed(folder, name)
        fitted.fit(module, datamodule=data(batch_size=8))
        saved = [
            torch.load(folder / f"step={step}.ckpt", weights_only=True)["grade_lightning"]["parts"][part]
            for step in (3, 4, 8)
        ]
        assert saved[0] == ({"beta": 0.1} if key == "beta" else {})  # as it was at the start
        assert saved[1][key] != saved[2][key] == states(module)[part][key]


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


@pytest.mark.parametrize("epochs", mostly_slow([1, 2, 6], 2))
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
        def observe(self, seen: Experience) -> None:
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


def test_micro_batches_of_about_as_many_tokens_are_the_same_step() -> None:
    """Short completions together, long ones nearly alone; the gradient of a step is that of equal rows."""
    found = []
    for what in ("rows", "tokens"):
        module = build(GRPO, num_generations=4, epochs=2, micro_batches=what)
        watch = run(module, *(prompts(4, 4, seed) for seed in range(2)), accumulate_grad_batches=4)
        found.append(watch)
    rows, tokens = found
    assert len(tokens.gradients) == len(rows.gradients) == 4
    for ours, truth in zip(tokens.gradients, rows.gradients, strict=True):
        assert distance(ours, truth) < 1e-9


@pytest.mark.parametrize(("whole_groups", "smallest"), [(False, 11 * 7), (True, 2 * 41)])
def test_micro_batches_by_tokens_hold_every_row_once_and_none_is_large(whole_groups: bool, smallest: int) -> None:
    lengths, prompt = torch.tensor([1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 20, 20, 40, 40]), 1
    ids = torch.ones(len(lengths), 40, dtype=torch.long)
    mask = torch.arange(40) < lengths.unsqueeze(1)
    labels = torch.arange(len(lengths)) // 2
    rollout = Rollout(ids[:, :prompt], ids[:, :prompt], ids, mask, None, make_tokenizer(), groups=labels)
    seen = Experience(rollout, Scores(torch.zeros(len(lengths)), {}))
    batching = Batching("prompts", 2, accumulation=4)
    plans = [plan_steps(seen, batching, Reduce().mean, whole_groups, by_tokens=by) for by in (False, True)]
    for plan in plans:
        assert sorted(torch.cat([rows for rows, _ in plan]).tolist()) == list(range(len(lengths)))
        assert {totals for _, totals in plan} == {plans[0][0][1]}
    largest = [max(len(rows) * (prompt + int(lengths[rows].max())) for rows, _ in plan) for plan in plans]
    assert largest == [4 * 41, smallest]
