"""What is not finite reaches no weight: rewards, losses, gradients."""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from grade_lightning import optim
from grade_lightning.advantages import Baseline
from grade_lightning.errors import InputError
from grade_lightning.kl import KL
from grade_lightning.methods import DPO, PPO, RLOO, Grade, GradeSTE, Reinforce
from grade_lightning.modules import AlignmentModule
from grade_lightning.rewards import FunctionReward
from tests.conftest import mostly_slow
from tests.methods.toy_task import Toy, batches, every_method, make, trainer, weights


class Spoilt(Toy):
    """Infinite while it is told to."""

    spoilt = False

    def score_embeddings(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        scores = super().score_embeddings(embeddings, mask)
        return (1 + scores) * math.inf if self.spoilt else scores


class Watch(Callback):
    """Spoils the reward of some rollouts, and keeps the weights after each step."""

    def __init__(self, *rollouts: int) -> None:
        self.rollouts = rollouts
        self.found: list[dict[str, Tensor]] = []
        self.skipped: list[int] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        pl_module.reward.spoilt = batch_idx // pl_module.batching.steps_per_batch in self.rollouts

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.found.append(weights(pl_module))
        self.skipped.append(pl_module.guard.skipped)


def changed(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return any(not torch.equal(one[name], two[name]) for name in one)


@every_method
def test_a_step_that_is_not_finite_is_left_out(method: type[AlignmentModule]) -> None:
    """Of three rollouts the second has infinite rewards: the weights stay as they were, and move with the third."""
    module = make(method, lr=1e-3)
    module.reward, watch = Spoilt(), Watch(1)
    visits = module.batching.steps_per_batch
    run = trainer(callbacks=[watch], limit_val_batches=0)
    run.fit(module, batches(3 * visits))
    assert all(value.isfinite().all() for value in watch.found[-1].values())
    assert not changed(watch.found[visits - 1], watch.found[2 * visits - 1])
    assert changed(watch.found[2 * visits - 1], watch.found[-1])
    assert watch.skipped[visits - 1 :: visits] == [0, visits, visits]
    assert float(run.callback_metrics["train/skipped_steps"]) == module.guard.skipped == visits


@pytest.mark.parametrize("method", [GradeSTE, RLOO, DPO, Grade])
def test_three_in_a_row_end_the_run_and_leave_their_batch(method: type[AlignmentModule], tmp_path: Path) -> None:
    module = make(method)
    module.reward, watch = Spoilt(), Watch(0, 2, 3, 4)
    run = trainer(callbacks=[watch], limit_val_batches=0, logger=CSVLogger(tmp_path))
    with pytest.raises(InputError, match="3 batches in a row gave gradients that are not finite, the last at step 4"):
        run.fit(module, batches(9))
    assert module.guard.skipped == 4
    assert all(value.isfinite().all() for value in weights(module).values())
    (path,) = tmp_path.rglob("not_finite_step_4_rank_0.json")
    rows = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert len(rows) == len(module.last_rollout[0].prompts)
    assert {*rows[0]} == {"prompt", "completion", "reward"}


@every_method
def test_a_policy_that_collapsed_to_one_token(method: type[AlignmentModule]) -> None:
    """All mass on a token, for the policy alone: entropy 0, and all that is measured or trained stays finite."""
    module = make_loaded(method, lr=1e-3)
    with torch.no_grad():
        module.policy.base.model.norm.weight.mul_(1e6)
    module._started = False  # it is not its reference
    run = trainer(limit_val_batches=0)
    run.fit(module, batches(2 * module.batching.steps_per_batch))
    assert float(run.callback_metrics["train/entropy"]) == pytest.approx(0, abs=1e-3)
    assert all(value.isfinite() for value in run.callback_metrics.values())
    assert all(value.isfinite().all() for value in weights(module).values())
    assert module.guard.skipped == 0


@every_method
def test_a_gradient_that_overflows(method: type[AlignmentModule]) -> None:
    """Rewards beyond what float32 can square."""

    class Huge(Toy):
        def score_embeddings(self, embeddings: Tensor, mask: Tensor) -> Tensor:
            return super().score_embeddings(embeddings, mask) * 3e38

    module = make_loaded(method)
    before, module.reward = weights(module), Huge()
    trainer(limit_val_batches=0).fit(module, batches(module.batching.steps_per_batch))
    assert all(value.isfinite().all() for value in weights(module).values())
    assert module.guard.skipped == 0 or not changed(before, weights(module))


def returning(values: Callable[[int], list[float | None]]) -> FunctionReward:
    return FunctionReward(lambda prompts, completions, **columns: values(len(completions)))


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("method", mostly_slow([RLOO, PPO, Reinforce, DPO], PPO, DPO))
def test_a_function_that_returns_it(method: type[AlignmentModule], number: float) -> None:
    """One completion of the batch is enough."""
    module = make(method)
    module.reward = returning(lambda n: [number, *[0.5] * (n - 1)])
    trainer(limit_val_batches=0).fit(module, batches(module.batching.steps_per_batch))
    assert not changed(weights(make_loaded(method)), weights(module))
    assert module.guard.skipped == module.batching.steps_per_batch


def test_under_a_scaler_the_gradients_are_left_to_it() -> None:
    """It looks for its scale by steps that overflow: they are counted, and end no run."""
    module = make_loaded(RLOO)
    plugin = SimpleNamespace(scaler=object())
    module._trainer = SimpleNamespace(precision_plugin=plugin)  # type: ignore[assignment]
    (parameter, *_) = trained = [p for p in module.parameters() if p.requires_grad]
    for times in (1, 2, 3, 4):
        parameter.grad = torch.full_like(parameter, math.inf)
        module.on_before_optimizer_step(torch.optim.SGD(trained, lr=1.0))
        assert parameter.grad is not None
        assert module.guard.skipped == times


def make_loaded(method: type[AlignmentModule], **kwargs: Any) -> AlignmentModule:
    module = make(method, **kwargs)
    module.configure_model()
    return module


def test_none_abstains() -> None:
    """Means are over those that answered, and the step counts."""
    module = make(RLOO)
    module.reward = returning(lambda n: [None, None, *[float(i) for i in range(n - 2)]])
    run = trainer(limit_val_batches=0)
    run.fit(module, batches(1))
    assert module.guard.skipped == 0
    assert float(run.callback_metrics["train/reward"]) == pytest.approx((48 - 3) / 2)


def test_the_spread_of_large_rewards() -> None:
    """Far from zero it is that of small ones."""
    spreads = []
    for far in (0.0, 30000.0):
        module = make(RLOO)
        module.reward = returning(lambda n, far=far: [far + i / 16 for i in range(n)])
        run = trainer(limit_val_batches=0)
        run.fit(module, batches(1))
        spreads.append(float(run.callback_metrics["train/reward_std"]))
    assert spreads[1] == pytest.approx(spreads[0], rel=1e-2)


def test_running_statistics_stay_finite() -> None:
    module = make(Reinforce, kl=KL(0.1, target=1.0))
    assert isinstance(module, Reinforce)
    module.reward = Spoilt()
    trainer(callbacks=[Watch(1)], limit_val_batches=0).fit(module, batches(3))
    assert isinstance(module.advantage, Baseline)
    assert module.advantage.average is not None
    assert math.isfinite(module.advantage.average)
    assert math.isfinite(module.beta)


def test_the_count_is_in_the_checkpoint() -> None:
    module, checkpoint = make_loaded(RLOO), dict[str, Any]()
    module.guard.load_state_dict({"skipped": 7, "bad": [(0, 5)]})
    module.on_save_checkpoint(checkpoint)
    again = make_loaded(RLOO)
    again.on_load_checkpoint(checkpoint | {"state_dict": again.state_dict()})
    assert again.guard.state_dict() == {"skipped": 7, "bad": [(0, 5)]}


@pytest.mark.parametrize("name", ["DCTAdamW", "GaLore"])
def test_low_rank_on_adapters_is_refused(name: str) -> None:
    """By a rank that the matrices of LoRA have room for; without LoRA the same optimizer is taken."""
    if name == "GaLore":
        pytest.importorskip("pytorch_optimizer")
    optimizer = partial(getattr(optim, name), rank=2)
    with pytest.raises(InputError, match=rf"^--model.optimizer {name}: .*leave --model.policy.lora out$"):
        make(RLOO, lora=True, optimizer=optimizer).configure_optimizers()
    make(RLOO, optimizer=optimizer).configure_optimizers()
