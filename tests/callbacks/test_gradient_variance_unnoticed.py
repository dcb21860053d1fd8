"""Training that does not notice that it is watched: of our methods, in the middle of windows, of any module."""

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from grade_lightning.callbacks.gradient_variance import GradientVariance
from grade_lightning.callbacks.probe import probe
from grade_lightning.kl import KL
from grade_lightning.methods import DPO, PPO, GradeSTE, Reinforce
from grade_lightning.modules import AlignmentModule
from grade_lightning.rollouts import Sampler
from tests.callbacks.test_frozen import random_state
from tests.callbacks.watching import assert_logged_alike, read, undisturbed
from tests.conftest import mostly_slow
from tests.methods.toy_task import (
    Recorder,
    assert_same,
    batches,
    make,
    over,
    trainer,
    weights,
)

pytestmark = pytest.mark.usefixtures("own_random_state")


def assert_trains_alike(
    build: Callable[[], AlignmentModule], data: DataLoader[Any], callback: Callback, **kwargs: Any
) -> None:
    """With the callback and without it: weights, what each step logged, random states."""
    found = []
    for callbacks in ([callback], []):
        random.seed(0)
        np.random.seed(0)
        module, recorder = build(), Recorder()
        trainer(callbacks=[*callbacks, recorder], log_every_n_steps=1, **kwargs).fit(module, data)
        found.append((weights(module), [undisturbed(step) for step in recorder.steps], random_state()))
    (weights_with, logged_with, random_with), (weights_without, logged_without, random_without) = found
    assert "train/loss" in logged_without[-1]
    assert_same(weights_with, weights_without)
    assert_logged_alike(logged_with, logged_without)
    assert random_with == random_without


@over("PPO")
def test_training_is_what_it_would_be_without_it(method: type[AlignmentModule]) -> None:
    watch = GradientVariance(probe_every_n_steps=5, prompts=2, draws=2)
    assert_trains_alike(lambda: make(method, sampler=Sampler(max_new_tokens=3)), batches(20, repeat=1), watch)
    window = make(method).batching.steps_per_batch  # which is not interrupted
    assert [step for step, *_ in watch.history] == [math.ceil(step / window) * window for step in (0, 5, 10, 15)]


@pytest.mark.parametrize(
    ("method", "lora"), [pytest.param(m, m is GradeSTE, marks=pytest.mark.slow) for m in (GradeSTE, Reinforce, DPO)]
)
def test_so_it_is_with_micro_batches_and_adapters(method: type[AlignmentModule], lora: bool) -> None:
    watch = GradientVariance(probe_every_n_steps=2, prompts=2, draws=2)
    assert_trains_alike(lambda: make(method, lora), batches(8, repeat=2), watch, accumulate_grad_batches=2)
    assert [step for step, *_ in watch.history] == [0, 2]


class EveryVisit(Callback):
    """Probes also in the middle of windows, where the callback itself would wait."""

    def __init__(self) -> None:
        self.middle = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.middle += pl_module._window is not None
        probe(trainer, pl_module, batch, batch_idx, prompts=2, draws=2)


@pytest.mark.slow
@pytest.mark.parametrize(("epochs", "minibatches", "accumulate"), [(4, 1, 1), (1, 2, 2)], ids=str)
def test_so_it_is_in_the_middle_of_windows(epochs: int, minibatches: int, accumulate: int) -> None:
    visits, every = epochs * minibatches * accumulate, EveryVisit()
    kl = KL(0.1, target=0.1, horizon=32)  # its β moves from window to window
    assert_trains_alike(
        lambda: make(PPO, epochs=epochs, minibatches=minibatches, kl=kl),
        batches(2 * visits),
        every,
        accumulate_grad_batches=accumulate,
    )
    assert every.middle == 2 * (visits - 1)


# ---- a module that is none of ours ----------------------------------------------------------------------------------


class Classifier(LightningModule):
    """Moves everything that a step can move."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))
        self.accuracy = MulticlassAccuracy(3)
        self.average, self.losses = 0.0, [0.0]
        self.register_buffer("slow", torch.zeros(3))
        self.slow: Tensor
        self.generator = torch.Generator().manual_seed(0)

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        x = x + 0.1 * torch.from_numpy(np.random.randn(*x.shape)).float() + 0.1 * random.random()
        x = x + 0.1 * torch.randn(x.shape, generator=self.generator)
        logits = self.net(x)
        loss = nn.functional.cross_entropy(logits, y)
        self.average = 0.9 * self.average + 0.1 * float(loss.detach())
        self.losses.append(float(loss.detach()))
        self.slow.data.lerp_(logits.detach().mean(0), 0.1)
        self.accuracy(logits, y)
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.log_dict({"loss": loss, "average": self.average}, prog_bar=True)
        if self.logger is not None:
            self.logger.experiment.add_scalar("own/loss", loss, self.global_step)  # type: ignore[attr-defined]
        return loss

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        return self.step(*batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class OfDicts(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.step(batch["x"], batch["y"])


class WithoutIndex(Classifier):
    def training_step(self, batch: tuple[Tensor, Tensor]) -> Any:  # type: ignore[override]
        return {"loss": self.step(*batch), "more": 1}


def blobs(kind: type[Classifier]) -> DataLoader[Any]:
    """Three clusters; shuffled by the global random state."""
    y = torch.arange(3).repeat(48)
    x = 3 * nn.functional.one_hot(y, 4) + torch.randn(144, 4, generator=torch.Generator().manual_seed(0))
    data: Any = TensorDataset(x, y)
    if kind is OfDicts:
        data = [{"x": a, "y": b} for a, b in zip(x, y, strict=True)]
    return DataLoader(data, batch_size=24, shuffle=True)


@pytest.mark.parametrize("kind", mostly_slow([Classifier, OfDicts, WithoutIndex], OfDicts))
def test_any_module_trains_as_it_would_without_it(kind: type[Classifier], tmp_path: Path) -> None:
    found = []
    watch = GradientVariance(window=2, probe_every_n_steps=2, prompts=3, draws=8)
    for name in ("with", "without"):
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(0)
        module, recorder = kind(), Recorder()
        logger = TensorBoardLogger(tmp_path, name="", version=name)
        trainer(
            callbacks=[watch, recorder] if name == "with" else [recorder],
            logger=logger,
            log_every_n_steps=1,
            accumulate_grad_batches=2,
            max_epochs=2,
        ).fit(module, blobs(kind))
        events = read(tmp_path / name)
        own = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
        assert len(own["own/loss"]) == 12
        logged = [undisturbed(step) for step in recorder.steps]
        state = (module.average, module.losses, module.generator.get_state().tolist(), random_state())
        found.append((weights(cast(Any, module)), state, logged, undisturbed(cast(Any, own))))
    (weights_with, *rest_with), (weights_without, *rest_without) = found
    assert_same(weights_with, weights_without)
    assert rest_with == rest_without
    assert [step for step, *_ in watch.history] == [0, 2, 4]
    names = {name for name in watch.metrics if name.count("/") == 1}
    assert {"grad/relative_std", "probe/relative_std", "probe/prompt_variance", "probe_adam/variance"} < names
    assert [name for name in names if not math.isfinite(watch.metrics[name]) and not name.endswith("_high")] == []
    assert watch.metrics["probe/sampling_variance"] > 0
