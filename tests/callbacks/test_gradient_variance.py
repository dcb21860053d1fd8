"""The scatter of gradients whose covariance is known, alone and in two processes; and training that does not notice."""

import math
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import FSDPStrategy
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.futures import Future
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from grade_lightning.callbacks.gradient_variance import GradientVariance, draw_noise
from grade_lightning.callbacks.probe import layer_of, probe
from grade_lightning.errors import InputError
from grade_lightning.kl import KL
from grade_lightning.methods import DPO, GRPO, PPO, GradeSTE, Reinforce
from grade_lightning.module import AlignmentModule
from grade_lightning.rollouts import Sampler
from tests.callbacks.test_frozen import random_state
from tests.conftest import VOCABULARY
from tests.functional.test_moments import assert_unbiased
from tests.methods.test_contract import (
    Recorder,
    _restore_the_seed,  # noqa: F401
    assert_same,
    batches,
    every_method,
    make,
    trainer,
    weights,
)

MEAN = torch.tensor([1.0, -0.8, 0.5, 0.0, 0.7, -0.2])
ROOT = 0.25 * torch.randn(6, 6, generator=torch.Generator().manual_seed(1))
COVARIANCE = ROOT @ ROOT.T
NORM, TRACE = float(MEAN.square().sum()), float(COVARIANCE.trace())


def rows(*shape: int, seed: int = 0) -> Tensor:
    """Rows with this mean and covariance, (*shape, 6)."""
    return MEAN + torch.randn(*shape, 6, generator=torch.Generator().manual_seed(seed)) @ ROOT.T


class MeanRow(LightningModule):
    """Whatever its weights are, its gradient is the mean of the rows, each with fresh noise of its own."""

    def __init__(self, noise: float = 0.0, optimizer: Callable[..., Any] = torch.optim.SGD) -> None:
        super().__init__()
        self.first, self.rest = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(4))
        self.noise, self.optimizer = noise, optimizer

    def mean(self, batch: Tensor) -> Tensor:
        noisy = batch + self.noise * torch.randn_like(batch) if self.noise else batch
        return (noisy * torch.cat([self.first, self.rest])).sum(-1).mean()

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss = self.mean(batch)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return self.optimizer([p for p in self.parameters() if p.requires_grad], lr=0.01)


class Memory(Logger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int | None, dict[str, float]]] = []

    name, version = "memory", 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.seen.append((step, dict(metrics)))

    def of(self, name: str) -> list[dict[str, float]]:
        """All entries that have a figure of this name."""
        return [figures for _, figures in self.seen if name in figures]


def fit(module: LightningModule, data: Any, watch: GradientVariance, *callbacks: Callback, **kwargs: Any) -> Memory:
    """One batch of the data after the other."""
    memory = Memory()
    settings: dict[str, Any] = {"logger": memory, "log_every_n_steps": 1}
    loader: DataLoader[Any] = data if isinstance(data, DataLoader) else DataLoader(list(data), batch_size=None)  # type: ignore[arg-type]
    run = trainer(callbacks=[watch, *callbacks], **settings | kwargs)
    run.fit(module, loader)
    return memory


def expected(*steps: Tensor, size: float) -> dict[str, float]:
    """The figures of these steps together, each given by the gradients of its groups, (n, d); and rows in a step."""
    variances = [float(step.double().var(0).sum()) / len(step) for step in steps]
    signals = [float(step.double().mean(0).square().sum()) - v for step, v in zip(steps, variances, strict=True)]
    noise = sum(variances) / sum(signals)
    return {
        "grad/variance": sum(variances) / len(steps),
        "grad/relative_std": math.sqrt(noise),
        "grad/snr": 1 / noise,
        "grad/cosine": 1 / (1 + noise),
        "grad/noise_scale": noise * size,
    }


def assert_figures(found: dict[str, float], truth: dict[str, float], rel: float = 1e-5) -> None:
    assert {name: found[name] for name in truth} == pytest.approx(truth, rel=rel)


ENDS = {"relative_std_low", "relative_std_high"}
PASSIVE = {"variance", "relative_std", "snr", "cosine", "noise_scale"} | ENDS
SHAPE = {"norm", "across_tensor_std"}


# ---- passive: known covariance, micro-batches and processes ---------------------------------------------------------

WINDOWS, WINDOW, ROWS = 30, 10, 3
"""So many windows of steps, that do not overlap, of micro-batches with so many rows on each process."""


def windows(groups: int) -> Tensor:
    return rows(WINDOWS * WINDOW, groups, ROWS, seed=groups)


def fit_windows(
    data: Tensor, accumulate: int, *callbacks: Callback, noise: float = 0.0, **kwargs: Any
) -> list[dict[str, float]]:
    """The figures of each window; (steps, micro-batches of this process, rows, 6)."""
    settings: dict[str, Any] = {"accumulate_grad_batches": accumulate, "log_every_n_steps": WINDOW}
    torch.manual_seed(0)
    memory = fit(MeanRow(noise), data.flatten(0, 1), GradientVariance(WINDOW), *callbacks, **settings | kwargs)
    return memory.of("grad/norm")


def assert_known(found: list[dict[str, float]], groups: int, noise: float = 0.0) -> None:
    """Each window has its own interval; all together are unbiased."""
    assert len(found) == WINDOWS
    covariance = COVARIANCE + noise**2 * torch.eye(6)
    size, variance = ROWS * groups, float(covariance.trace()) / (ROWS * groups)
    truth = math.sqrt(variance / NORM)
    covered = [x["grad/relative_std_low"] <= truth <= x["grad/relative_std_high"] for x in found]
    assert sum(covered) >= 25  # of 30 at 95 %: fewer in 0.3 % of all cases
    assert sum(x["grad/relative_std_high"] - x["grad/relative_std_low"] for x in found) / WINDOWS < truth
    for x in found:
        ratio = x["grad/relative_std"] ** 2
        assert_figures(x, {"grad/snr": 1 / ratio, "grad/cosine": 1 / (1 + ratio), "grad/noise_scale": ratio * size})
    error = math.sqrt(2 * float(covariance.square().sum()) / (groups - 1) / (WINDOWS * WINDOW)) / size
    assert error < 0.05 * variance
    mean = sum(x["grad/variance"] for x in found) / WINDOWS
    assert abs(mean - variance) < 4 * error


@pytest.mark.parametrize(("groups", "noise"), [(2, 0.5), (4, 0.0)])
def test_micro_batches_of_a_known_covariance(groups: int, noise: float) -> None:
    assert_known(fit_windows(windows(groups), groups, noise=noise), groups, noise)


def test_one_step_against_the_sample_covariance() -> None:
    """All figures of each step, from the gradients of its micro-batches themselves."""
    data = rows(6, 4, ROWS)
    memory = fit(MeanRow(), data.flatten(0, 1), GradientVariance(window=2), accumulate_grad_batches=4)
    found = memory.of("grad/norm")
    assert len(found) == 6
    for i in range(6):
        groups = data.mean(2)
        assert set(found[i]) == {f"grad/{name}" for name in PASSIVE | SHAPE}
        assert_figures(found[i], expected(*groups[max(0, i - 1) : i + 1], size=12))
        step = groups[i].mean(0)
        assert_figures(found[i], {"grad/norm": float(step.norm())})
        assert_figures(found[i], {"grad/across_tensor_std": float(np.std([float(step[:2].norm()), step[2:].norm()]))})


def test_figures_are_logged_at_the_step_of_the_module_s_own(tmp_path: Path) -> None:
    memory = fit(MeanRow(), rows(24, 2), GradientVariance(), accumulate_grad_batches=2, log_every_n_steps=3)
    own, ours = ([step for step, figures in memory.seen if name in figures] for name in ("loss", "grad/norm"))
    assert own == ours == [2, 5, 8, 11]


def test_one_micro_batch_alone_says_nothing_about_its_scatter() -> None:
    memory = fit(MeanRow(), rows(3, 4), GradientVariance())
    assert [set(figures) for figures in memory.of("grad/norm")] == [{f"grad/{name}" for name in SHAPE}] * 3


def test_before_clipping() -> None:
    data = rows(4, 2, ROWS)
    memory = fit(MeanRow(), data.flatten(0, 1), GradientVariance(4), accumulate_grad_batches=2, gradient_clip_val=1e-3)
    norm = float(data.mean((1, 2))[-1].norm())
    assert_figures(memory.of("grad/norm")[-1], expected(*data.mean(2), size=6) | {"grad/norm": norm})


@pytest.mark.parametrize("batches", [6, 7])
def test_an_epoch_that_ends_before_all_micro_batches_are_there(batches: int) -> None:
    """Lightning steps with what there is, divided by what there should be. 5 + 1 leaves one that says nothing."""
    data = rows(batches, ROWS)
    memory = fit(MeanRow(), data, GradientVariance(), accumulate_grad_batches=5, max_epochs=2)
    found, means = memory.of("grad/norm"), data.mean(1)
    assert len(found) == 4
    whole, rest = means[:5], means[5:]
    steps = [whole, whole] if len(rest) < 2 else [whole, rest, whole, rest]
    assert_figures(found[-1], expected(*steps, size=15))


class Skips(MeanRow):
    """Has no loss for some batches."""

    skipped: tuple[int, ...]

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return None if batch_idx in self.skipped else super().training_step(batch, batch_idx)


@pytest.mark.parametrize("skipped", [(1, 5, 6), (0, 1, 5), (3, 4, 5, 8)], ids=str)
def test_micro_batches_without_a_loss(skipped: tuple[int, ...]) -> None:
    """Of three in each step: at its beginning or at its end, so that two, one or none are left."""
    data = rows(9, ROWS)
    module = Skips()
    module.skipped = skipped
    found = fit(module, data, GradientVariance(), accumulate_grad_batches=3).of("grad/norm")
    left = [[j for j in range(i, i + 3) if j not in skipped] for i in (0, 3, 6)]
    steps = [data[step].mean(1) for step in left if step]
    assert len(found) == len(steps)
    assert_figures(found[-1], expected(*(step for step in steps if len(step) > 1), size=9))
    # Lightning divides by three, whatever is left
    assert_figures(found[-1], {"grad/norm": float((steps[-1].sum(0) / 3).norm())})


def test_frozen_parameters_do_not_count() -> None:
    module = MeanRow()
    module.rest.requires_grad_(False)
    data = rows(4, ROWS)
    memory = fit(module, data, GradientVariance(probe_every_n_steps=1), accumulate_grad_batches=2)
    groups = data.mean(1)[..., :2].unflatten(0, (2, 2))
    found = memory.of("grad/norm")[-1]
    assert_figures(found, expected(*groups, size=6) | {"grad/norm": float(groups[1].mean(0).norm())})
    assert found["grad/across_tensor_std"] == 0
    assert "probe/variance/rest" not in memory.of("probe/variance")[0]


class Unused(MeanRow):
    """Has a parameter that its loss does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.ones(3))


def test_unused_parameters_have_no_gradient() -> None:
    data = rows(2, 6)
    memory = fit(Unused(), data, GradientVariance(probe_every_n_steps=1, sketch=None), accumulate_grad_batches=2)
    assert_figures(memory.of("grad/norm")[0], expected(data.mean(1), size=12))
    (found,) = memory.of("probe/variance")
    assert_figures(found, {"probe/variance": probed(data[0])["variance"] / 2, "probe/variance/unused": 0.0}, rel=1e-4)


class Unfreezes(Callback):
    """From the second epoch on everything is trained."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            pl_module.rest.requires_grad_(True)
            trainer.optimizers[0].add_param_group({"params": [pl_module.rest]})


def test_parameters_that_are_trained_later() -> None:
    module = MeanRow()
    module.rest.requires_grad_(False)
    data = rows(4, ROWS)
    memory = fit(module, data, GradientVariance(2), Unfreezes(), accumulate_grad_batches=2, max_epochs=2)
    groups, found = data.mean(1).unflatten(0, (2, 2)), memory.of("grad/norm")
    assert_figures(found[1], expected(*groups[..., :2], size=6))
    assert_figures(found[3], expected(*groups, size=6) | {"grad/norm": float(groups[1].mean(0).norm())})


class Part(MeanRow):
    """Gives the optimizer one of its parameters; nobody ever clears the gradient of the other."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([self.first], lr=0.01)


def test_only_what_the_optimizer_trains_counts() -> None:
    data = rows(6, ROWS)
    memory = fit(Part(), data, GradientVariance(), accumulate_grad_batches=2)
    groups = data.mean(1)[..., :2].unflatten(0, (3, 2))
    norm = float(groups[-1].mean(0).norm())
    assert_figures(memory.of("grad/norm")[-1], expected(*groups, size=6) | {"grad/norm": norm})


class Differentiates(MeanRow):
    """Uses the gradient of a parameter in its loss, as a penalty of gradients does."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss = self.mean(batch)
        if batch_idx in (2, 3):
            torch.autograd.grad(loss.square(), self.first, create_graph=True)
        return loss


def test_a_gradient_that_is_seen_twice_is_no_figure() -> None:
    data = rows(8, ROWS)
    memory = fit(Differentiates(), data, GradientVariance(), accumulate_grad_batches=2)
    found = memory.of("grad/norm")
    steps = data.mean(1).unflatten(0, (4, 2))
    assert_figures(found[0], expected(steps[0], size=6))
    assert_figures(found[1], expected(steps[0], size=6))
    assert_figures(found[3], expected(steps[0], *steps[2:], size=6))


class Fails(Callback):
    """In the middle of a step."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 4:
            raise KeyError("in the middle")


def test_a_fit_that_failed_leaves_nothing_to_the_next() -> None:
    """The first has seen one micro-batch of a second step."""
    data, watch = rows(8, ROWS), GradientVariance()
    module = MeanRow()
    with pytest.raises(KeyError, match="in the middle"):
        fit(module, 5 * data, watch, Fails(), accumulate_grad_batches=4)
    for parameter in module.parameters():
        parameter.grad = None
    steps = data.mean(1).unflatten(0, (2, 4))
    found = fit(module, data, watch, accumulate_grad_batches=4).of("grad/norm")
    assert_figures(found[0], expected(5 * steps[0], steps[0], size=12))


def test_nothing_stays_on_the_parameters() -> None:
    module = MeanRow()
    fit(module, rows(4, ROWS), GradientVariance(), accumulate_grad_batches=2)
    assert [p for p in module.parameters() if p._backward_hooks] == []


# ---- passive: precision ---------------------------------------------------------------------------------------------


class Fused(torch.optim.SGD):
    """Takes the scale of 16-bit off by itself."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, lr=lr, fused=True)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, Fused])
def test_16_bit_losses_are_scaled_and_the_figures_are_not(optimizer: Callable[..., Any]) -> None:
    """One step overflows; the gradient scaler leaves it out, and so do the figures."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    data = rows(10, ROWS)
    data[4] = 1e37  # times the scale: infinite
    watch = GradientVariance(probe_every_n_steps=100, sketch=None)
    memory = fit(
        MeanRow(optimizer=optimizer),
        data,
        watch,
        accumulate_grad_batches=2,
        plugins=[MixedPrecision("16-mixed", device="cpu", scaler=scaler)],
    )
    assert scaler.get_scale() == 2.0**9
    found, means = memory.of("grad/norm"), data.mean(1).unflatten(0, (5, 2))
    assert_figures(found[0], expected(means[0], size=6) | {"grad/norm": float(means[0].mean(0).norm())})
    truth = expected(means[0], means[1], means[3], means[4], size=6)
    assert_figures(found[-1], truth | {"grad/norm": float(means[-1].mean(0).norm())})
    assert_figures(memory.of("probe/variance")[0], {"probe/variance": probed(data[0])["variance"] / 2})


class Matrix(MeanRow):
    """Its product is what autocast casts."""

    def mean(self, batch: Tensor) -> Tensor:
        return (batch @ torch.cat([self.first, self.rest]).unsqueeze(1)).mean()


def test_bfloat16() -> None:
    data, found = rows(20, ROWS), []
    for precision in ("32-true", "bf16-mixed"):
        watch = GradientVariance(probe_every_n_steps=100, sketch=None)
        memory = fit(Matrix(), data, watch, accumulate_grad_batches=2, precision=precision)
        found.append(memory.of("grad/norm")[-1] | memory.of("probe/variance")[0])
    names = ("grad/norm", "grad/variance", "grad/relative_std", "probe/variance")
    assert_figures(found[0], {name: found[1][name] for name in names}, rel=0.02)
    for name in ("grad/variance", "probe/variance"):
        assert found[0][name] != found[1][name]


# ---- probe: known covariance ----------------------------------------------------------------------------------------


def probed(batch: Tensor, blocks: int = 0) -> dict[str, float]:
    """Of a batch without noise, in blocks of as many rows (else each row): all scatter is that of the rows."""
    blocks = blocks or len(batch)
    size = len(batch) // blocks
    means = batch[: blocks * size].double().unflatten(0, (blocks, size)).mean(1)
    spread = float(means.var(0).sum())
    variance = spread * size / len(batch)  # of the mean of all rows
    return {"squared_norm": float(means.mean(0).square().sum()) - spread / blocks, "variance": variance}


NOISE = 0.6


@pytest.mark.parametrize(
    ("count", "prompts", "draws", "accumulate"),
    [(13, 6, 2, 1), (13, 6, 2, 3), (8, 9, 3, 1)],
    ids=["two rows in a block and one left", "three micro-batches", "fewer rows than blocks"],
)
def test_a_probe_of_a_known_covariance(count: int, prompts: int, draws: int, accumulate: int) -> None:
    watch = GradientVariance(probe_every_n_steps=1, prompts=prompts, draws=draws, sketch=None)
    memory = fit(MeanRow(NOISE), rows(60 * accumulate, count), watch, accumulate_grad_batches=accumulate)
    assert_probed(memory.of("probe/variance"), count * accumulate, watch.history)


def assert_probed(found: list[dict[str, float]], size: int, history: list[Any]) -> None:
    """Each probe has its own interval; all together are unbiased, for a step of so many rows."""
    assert len(found) == 60
    sampling, choice = 6 * NOISE**2 / size, TRACE / size

    def column(name: str) -> Tensor:
        return torch.tensor([figures[f"probe/{name}"] for figures in found], dtype=torch.float64)

    assert_unbiased(column("squared_norm"), NORM, least=0.1)
    assert_unbiased(column("sampling_variance"), sampling, least=0.06)
    assert_unbiased(column("prompt_variance"), choice, least=0.15)
    torch.testing.assert_close(column("variance"), column("sampling_variance") + column("prompt_variance"))
    for name, variance in (("relative_std", sampling + choice), ("sampling_relative_std", sampling)):
        truth = math.sqrt(variance / NORM)
        covered = (column(f"{name}_low") <= truth) & (truth <= column(f"{name}_high"))
        assert int(covered.sum()) >= 51  # of 60 at 95 %: fewer in 0.1 % of all cases
        assert float(column(f"{name}_high").median()) < 3.5 * truth
        torch.testing.assert_close(column(name).square(), _ratio(column, name))
    ratio = column("relative_std").square()
    torch.testing.assert_close(column("snr"), 1 / ratio)
    torch.testing.assert_close(column("cosine"), 1 / (1 + ratio))
    torch.testing.assert_close(column("noise_scale"), ratio * size)
    told = [(i, *(x[f"probe/relative_std{end}"] for end in ("", "_low", "_high"))) for i, x in enumerate(found)]
    assert history == told


def _ratio(column: Callable[[str], Tensor], name: str) -> Tensor:
    variance = column("variance" if name == "relative_std" else "sampling_variance")
    return variance / column("squared_norm")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_probe_without_noise_is_the_sample_covariance_of_the_rows(accumulate: int) -> None:
    """Seven rows in three blocks leave one out; the step is of all seven."""
    data = rows(2 * accumulate, 7)
    watch = GradientVariance(probe_every_n_steps=1, prompts=3, draws=2, sketch=None)
    memory = fit(MeanRow(), data, watch, accumulate_grad_batches=accumulate)
    for found, batch in zip(memory.of("probe/variance"), data[::accumulate], strict=True):
        truth = probed(batch, blocks=3)
        variance = truth["variance"] / accumulate
        assert found["probe/sampling_variance"] == pytest.approx(0, abs=1e-6)
        assert found["probe/sampling_relative_std"] == pytest.approx(0, abs=1e-3)
        assert_figures(found, {"probe/prompt_variance": variance, "probe/variance": variance}, rel=1e-4)
        assert_figures(found, {"probe/squared_norm": truth["squared_norm"]}, rel=1e-4)
        parts = [probed(part, blocks=3)["variance"] / accumulate for part in (batch[:, :2], batch[:, 2:])]
        assert_figures(found, dict(zip(("probe/variance/first", "probe/variance/rest"), parts, strict=True)), rel=1e-4)


def test_no_scatter_at_all() -> None:
    """Equal batches and no noise: the variance is zero, or by rounding a little less."""
    for seed in range(3):
        data = rows(1, 1, seed=seed).expand(20, 4, 6)
        memory = fit(MeanRow(), data, GradientVariance(5, probe_every_n_steps=1, prompts=4), accumulate_grad_batches=4)
        for figures in memory.of("grad/norm"):
            assert figures["grad/relative_std"] < 2e-3
            assert figures["grad/cosine"] == pytest.approx(1, abs=1e-5)
        for figures in memory.of("probe/variance"):
            assert figures["probe/relative_std"] < 2e-3
            assert abs(figures["probe/prompt_variance"]) < 1e-6


@pytest.mark.parametrize("count", [1, 2])
def test_blocks_that_are_too_few_for_an_interval(count: int) -> None:
    """Of one block there is no scatter between blocks, of two none is left when one is left out."""
    watch = GradientVariance(probe_every_n_steps=1, draws=8, sketch=None)
    (found,) = fit(MeanRow(0.1), rows(1, count), watch).of("probe/variance")
    assert math.isnan(found["probe/prompt_variance"]) is (count == 1)
    assert math.isnan(found["probe/relative_std_low"])
    assert found["probe/sampling_variance"] > 0
    assert found["probe/relative_std"] > 0


def test_when_it_probes() -> None:
    watch = GradientVariance(probe_every_n_steps=3)
    fit(MeanRow(NOISE), rows(8 * 2, 4), watch, accumulate_grad_batches=2, max_epochs=2)
    assert [step for step, *_ in watch.history] == [0, 3, 6, 9, 12, 15]


def test_it_does_not_probe_unless_it_is_told_to() -> None:
    watch = GradientVariance()
    memory = fit(MeanRow(), rows(4, 2), watch)
    assert not watch.history
    assert not [name for _, figures in memory.seen for name in figures if name.startswith("probe")]


@pytest.mark.parametrize(("epochs", "minibatches", "accumulate"), [(4, 1, 1), (2, 2, 1), (1, 1, 2), (2, 1, 2)], ids=str)
def test_rows_of_a_step_and_beginnings_of_windows(epochs: int, minibatches: int, accumulate: int) -> None:
    """A window of 12 prompts is given at each visit; a step trains on a part of them."""
    watch = GradientVariance(probe_every_n_steps=3, prompts=3, draws=2)
    visits = epochs * minibatches * accumulate
    module = make(PPO, epochs=epochs, minibatches=minibatches)
    found = fit(module, batches(3 * visits), watch, accumulate_grad_batches=accumulate).of("probe/variance")
    steps, step = epochs * minibatches, 12 / minibatches
    begins = [i * steps for i in range(3)]
    due = [begin for i, begin in enumerate(begins) if i == 0 or begin // 3 > begins[i - 1] // 3]
    assert [at for at, *_ in watch.history] == due
    for figures in found:
        ratio = figures["probe/variance"] / figures["probe/squared_norm"]
        if ratio > 0:
            assert figures["probe/noise_scale"] == pytest.approx(ratio * step, rel=1e-3)


# ---- probe: other metrics, sketches, seeds --------------------------------------------------------------------------


def test_in_the_metric_of_adam() -> None:
    """Each component divided by √v̂ + ε, here from the history of the gradients itself."""
    data = rows(4, 6)
    watch = GradientVariance(probe_every_n_steps=1, prompts=3, draws=2, sketch=None)
    memory = fit(MeanRow(optimizer=torch.optim.Adam), data, watch)
    found, second = memory.of("probe/variance"), torch.zeros(6, dtype=torch.float64)
    assert not [name for name in found[0] if name.startswith("probe_adam")]
    for step in range(1, 4):
        second = 0.999 * second + 0.001 * data[step - 1].double().mean(0).square()
        scale = 1 / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        truth = probed(data[step] * scale, blocks=3)
        assert_figures(found[step], {f"probe_adam/{name}": value for name, value in truth.items()}, rel=1e-3)
        assert_figures(found[step], {f"probe/{name}": value for name, value in probed(data[step], 3).items()}, 1e-3)
        assert {name.replace("_adam", "") for name in found[step] if "_adam" in name} == {
            name for name in found[step] if "_adam" not in name and name.count("/") == 1
        }


def test_other_optimizers_have_no_metric_of_adam() -> None:
    memory = fit(MeanRow(), rows(3, 4), GradientVariance(probe_every_n_steps=1))
    assert not [name for _, figures in memory.seen for name in figures if name.startswith("probe_adam")]


class Wide(LightningModule):
    """Two layers of 3 000 parameters, in two tensors, and of 5 000; its gradient is the mean row, with noise."""

    def __init__(self) -> None:
        super().__init__()
        one, two = {"a": torch.zeros(1500), "b": torch.zeros(1500)}, {"a": torch.zeros(5000)}
        self.layers = nn.ModuleList([nn.ParameterDict(one), nn.ParameterDict(two)])

    def training_step(self, batch: Tensor) -> Tensor:
        return ((batch + 0.5 * torch.randn_like(batch)) @ torch.cat(list(self.parameters()))).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.fixture(scope="module")
def wide() -> dict[Any, dict[str, float]]:
    """The figures of one probe by size of the sketch, and once more, and with another seed."""
    generator = torch.Generator().manual_seed(0)
    data = 1 + torch.randn(1, 8, 8000, generator=generator)
    found: dict[Any, dict[str, float]] = {}
    with pytest.MonkeyPatch.context() as patch:
        for name, sketch, seed in ((None, None, "0"), (256, 256, "0"), ("again", 256, "0"), ("other", 256, "1")):
            patch.setenv("PL_GLOBAL_SEED", seed)
            torch.manual_seed(random.randrange(10**6))  # not what decides
            watch = GradientVariance(probe_every_n_steps=1, sketch=sketch)
            (found[name],) = fit(Wide(), data, watch).of("probe/variance")
    return found


def test_sketches_against_whole_gradients(wide: dict[Any, dict[str, float]]) -> None:
    error = math.sqrt(2 / 256)
    names = [name for name in wide[None] if "variance" in name or "squared_norm" in name]
    assert {"probe/sampling_variance", "probe/variance/layers.0", "probe/variance/layers.1"} < set(names)
    for name in names:
        assert wide[256][name] != wide[None][name]
        assert wide[256][name] == pytest.approx(wide[None][name], rel=3 * error)
    whole = wide[None]["probe/variance/layers.0"] + wide[None]["probe/variance/layers.1"]
    assert wide[None]["probe/variance"] == pytest.approx(whole)
    assert wide[None]["probe/sampling_variance"] == pytest.approx(8000 * 0.25 / 8, rel=0.05)
    assert wide[None]["probe/prompt_variance"] == pytest.approx(8000 / 8, rel=0.05)
    assert wide[None]["probe/squared_norm"] == pytest.approx(8000, rel=0.05)


def test_the_seed_decides_the_draws(wide: dict[Any, dict[str, float]]) -> None:
    assert wide["again"] == wide[256]
    assert wide["other"]["probe/variance"] != wide[256]["probe/variance"]


class OldNoise(MeanRow):
    """Draws from the two generators that are not torch's."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self.mean(batch + torch.from_numpy(np.random.randn(*batch.shape)).float() + random.gauss(0, 1))


def test_the_seed_decides_the_draws_of_numpy_and_python_as_well() -> None:
    """Processes that began with the same seed must not share their noise."""
    found = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        found += fit(OldNoise(), rows(1, 4), GradientVariance(probe_every_n_steps=1)).of("probe/variance")
    assert found[0]["probe/sampling_variance"] > 0.1
    assert found[0] == pytest.approx(found[1], rel=0, abs=0, nan_ok=True)


class OtherName(MeanRow):
    """As Lightning calls it: by position, where there is more than one argument."""

    def training_step(self, batch: Tensor, _: int) -> Any:
        return self.mean(batch) * (_ + 1)


class AnyArguments(MeanRow):
    def training_step(self, *arguments: Any) -> Any:
        batch, index = arguments
        return self.mean(batch) * (index + 1)


class Defaults(MeanRow):
    def training_step(self, batch: Tensor, index: int = 7) -> Any:
        return self.mean(batch) * (index + 1)


@pytest.mark.parametrize("kind", [OtherName, AnyArguments, Defaults])
def test_however_a_training_step_calls_its_arguments(kind: type[MeanRow]) -> None:
    """The second batch has twice the gradient of the first."""
    data = rows(1, 4).expand(2, 4, 6)
    one, two = fit(kind(), data, GradientVariance(probe_every_n_steps=1, sketch=None)).of("probe/variance")
    assert_figures(one, {f"probe/{name}": value for name, value in probed(data[0]).items()}, rel=1e-4)
    assert_figures(two, {f"probe/{name}": 4 * value for name, value in probed(data[0]).items()}, rel=1e-4)


# ---- probe: of our methods -----------------------------------------------------------------------------------------


class Gradients(Callback):
    """Keeps the gradient of each optimizer step."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        self.seen.append(torch.cat([p.grad.flatten() for p in pl_module.parameters() if p.grad is not None]))


@pytest.mark.slow
@pytest.mark.parametrize("method", [GradeSTE, Reinforce, GRPO, DPO])
def test_figures_of_a_method_are_of_its_own_gradients(method: type[AlignmentModule]) -> None:
    """Of 100 steps at a learning rate of zero, of two micro-batches each, with prompts of their own."""
    steps, size = 100, 6
    ids = torch.randint(2, VOCABULARY, (2 * steps, size, 4), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": x, "attention_mask": torch.ones_like(x), "columns": {}} for x in ids]
    gradients, watch = Gradients(), GradientVariance(steps, probe_every_n_steps=4, prompts=3, draws=2, sketch=None)
    light_tails: dict[str, Any] = {"hops": 0} if method is GradeSTE else {}
    memory = fit(make(method, lr=0.0, **light_tails), data, watch, gradients, accumulate_grad_batches=2)
    seen = torch.stack(gradients.seen).double()
    assert len(seen) == steps
    deviations = (seen - seen.mean(0)).square().sum(1)
    variance, error = float(deviations.sum() / (steps - 1)), float(deviations.std()) / math.sqrt(steps)
    probes = torch.tensor([figures["probe/variance"] for figures in memory.of("probe/variance")])
    spread = float(probes.std()) / math.sqrt(len(probes))
    assert error < 0.2 * variance
    assert spread < 0.2 * variance
    assert abs(float(probes.mean()) - variance) < 4 * math.hypot(error, spread)
    assert memory.of("grad/variance")[-1]["grad/variance"] == pytest.approx(variance, abs=4 * error)


# ---- two processes --------------------------------------------------------------------------------------------------

PARALLEL: dict[str, Any] = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
SEEDS: list[int] = []
"""Of each training step, those of probes included."""


def rounded(state: Any, bucket: GradBucket) -> Future[Tensor]:
    """Under its own name torch refuses it without NCCL."""
    return bf16_compress_hook(state, bucket)


class Compresses(Callback):
    """As `DDPStrategy(ddp_comm_hook=bf16_compress_hook)`, which Lightning heeds on CUDA alone."""

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        cast(Any, trainer.strategy.model).register_comm_hook(None, rounded)


class Notes(MeanRow):
    """Writes down where its noise is from, to a place that is not its own."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        SEEDS.append(torch.initial_seed())
        return super().training_step(batch, batch_idx)


def share(module: AlignmentModule, rank: int) -> list[dict[str, Any]]:
    """Batches of a process: every other prompt."""
    part: list[dict[str, Any]] = []
    for batch in batches(6, repeat=2):
        part.append({name: x[rank::2] if isinstance(x, Tensor) else x for name, x in batch.items()})
    return part


def work(folder: Path) -> None:
    """What each of two processes does."""
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    found: dict[str, Any] = {}
    for groups in (2, 4):
        own = windows(groups).chunk(2, dim=1)[rank]
        found[f"groups {groups}"] = fit_windows(own, groups // 2, **PARALLEL)
    found["compressed"] = fit_windows(windows(2)[:, rank : rank + 1], 1, Compresses(), **PARALLEL)

    watch = GradientVariance(probe_every_n_steps=1, prompts=4, draws=2, sketch=None)
    memory = fit(MeanRow(NOISE), rows(60, 2, 9)[:, rank], watch, **PARALLEL)
    found |= {"probe": memory.of("probe/variance"), "history": watch.history}
    watch = GradientVariance(probe_every_n_steps=1, prompts=4, draws=2)
    uneven = fit(Notes(NOISE), rows(1, 6 - 4 * rank), watch, **PARALLEL)
    found |= {"uneven": uneven.of("probe/variance"), "seeds": SEEDS[:-1]}

    for name, watches in (("with", [GradientVariance(probe_every_n_steps=2, prompts=2, draws=2)]), ("without", [])):
        module = make(GRPO, num_generations=4)
        recorder = Recorder()
        run = trainer(callbacks=[*watches, recorder], log_every_n_steps=1, **PARALLEL)
        run.fit(module, DataLoader(share(module, rank), batch_size=None))  # type: ignore[arg-type]
        found[name] = {"weights": weights(module), "logged": [undisturbed(step) for step in recorder.steps]}
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "tests.callbacks.test_gradient_variance", str(folder)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PL_GLOBAL_SEED": "0"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("groups", [2, 4])
def test_processes_are_as_good_as_micro_batches(groups: int, ranks: list[dict[str, Any]]) -> None:
    """Two of them with one or two micro-batches each, and the same rows as micro-batches of one process."""
    one, two = (found[f"groups {groups}"] for found in ranks)
    assert one == two
    assert_known(one, groups)
    for ours, alone in zip(one, fit_windows(windows(groups), groups), strict=True):
        assert_figures(ours, alone, rel=1e-5)


def test_compressed_communication(ranks: list[dict[str, Any]]) -> None:
    """The mean is rounded to 8 bits; the gradients before it are not."""
    eps = 2.0**-8
    for ours, exact in zip(ranks[0]["compressed"], ranks[0]["groups 2"], strict=True):
        assert ours["grad/norm"] != exact["grad/norm"]
        assert ours["grad/norm"] == pytest.approx(exact["grad/norm"], rel=eps)
        variance = exact["grad/variance"]
        big = variance * (1 + 1 / exact["grad/relative_std"] ** 2)  # |G|² and its noise
        assert ours["grad/variance"] == pytest.approx(variance, abs=2 * eps * big)
        assert ours["grad/relative_std"] == pytest.approx(exact["grad/relative_std"], rel=4 * eps * big / variance)


def test_a_probe_of_the_prompts_of_both_processes(ranks: list[dict[str, Any]]) -> None:
    one, two = ranks
    assert one["probe"] == two["probe"]
    assert_probed(one["probe"], 18, one["history"])


def test_processes_with_unequal_batches_probe_equally_many(ranks: list[dict[str, Any]]) -> None:
    """Of six and two rows two blocks each; with noise of their own."""
    one, two = ranks
    assert one["uneven"][0]["probe/squared_norm"] == two["uneven"][0]["probe/squared_norm"]
    assert len(one["seeds"]) == len(two["seeds"]) == 4
    assert len({*one["seeds"], *two["seeds"]}) == 8


def test_two_processes_train_as_they_would_without_it(ranks: list[dict[str, Any]]) -> None:
    one, two = ranks
    assert_same(one["with"]["weights"], two["with"]["weights"])
    for found in ranks:
        assert_same(found["with"]["weights"], found["without"]["weights"])
        assert_logged_alike(found["with"]["logged"], found["without"]["logged"])


# ---- training that does not notice ----------------------------------------------------------------------------------


def undisturbed(step: dict[str, float]) -> dict[str, float]:
    """What is logged, but for our own figures and the clock."""
    clock = {"train/tokens_per_second", "tok/s"}
    return {n: x for n, x in step.items() if n not in clock and n.split("/")[0] not in ("grad", "probe", "probe_adam")}


def assert_logged_alike(one: list[dict[str, float]], two: list[dict[str, float]]) -> None:
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=0, abs=0, nan_ok=True)


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


@every_method
def test_training_is_what_it_would_be_without_it(method: type[AlignmentModule]) -> None:
    watch = GradientVariance(probe_every_n_steps=5, prompts=2, draws=2)
    assert_trains_alike(lambda: make(method, sampler=Sampler(max_new_tokens=3)), batches(20, repeat=1), watch)
    several = make(method).visits > 1  # steps on a window of four, which is not interrupted
    assert [step for step, *_ in watch.history] == ([0, 8, 12, 16] if several else [0, 5, 10, 15])


@pytest.mark.parametrize(("method", "lora"), [(GradeSTE, True), (Reinforce, False), (DPO, False)])
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


@pytest.mark.parametrize("kind", [Classifier, OfDicts, WithoutIndex])
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


# ---- checkpoints ----------------------------------------------------------------------------------------------------


class Draws(MeanRow):
    """Has noise only where the gradient is measured, so that a resumed run is the run."""

    def draw_loss(self, batch: Tensor) -> Tensor:
        return self.mean(batch + NOISE * torch.randn_like(batch))


def test_a_resumed_run_measures_as_the_whole(tmp_path: Path) -> None:
    """The window goes on where it was, and so do history and probes."""

    def build(epochs: int) -> tuple[Trainer, GradientVariance, Memory]:
        watch, memory = GradientVariance(window=7, probe_every_n_steps=3), Memory()
        run = trainer(
            callbacks=[watch], logger=memory, log_every_n_steps=1, accumulate_grad_batches=2, max_epochs=epochs
        )
        return run, watch, memory

    data: DataLoader[Any] = DataLoader(list(rows(10, 4)), batch_size=None)  # type: ignore[arg-type]
    whole, whole_watch, whole_memory = build(2)
    whole.fit(Draws(), data)
    half, _, _ = build(1)
    half.fit(Draws(), data)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed, watch, memory = build(2)
    resumed.fit(Draws(), data, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert [step for step, *_ in watch.history] == [0, 3, 6, 9]
    assert watch.history == whole_watch.history
    later = [entry for entry in whole_memory.seen if (entry[0] or 0) >= 5]
    assert len(later) == len(memory.seen)
    assert [step for step, _ in memory.seen] == [step for step, _ in later]
    for (_, one), (_, two) in zip(memory.seen, later, strict=True):
        assert one == pytest.approx(two, rel=1e-6)
    assert watch.metrics == pytest.approx(whole_watch.metrics, rel=1e-6)


def test_a_state_replaces_what_was_there() -> None:
    """A callback that has seen another run."""
    data = rows(8, 2, 2, seed=1)
    one, two = GradientVariance(window=3), GradientVariance(window=3)
    fit(MeanRow(), rows(12, 4), one, accumulate_grad_batches=2)
    fit(MeanRow(), data[:2].flatten(0, 1), two, accumulate_grad_batches=2)
    one.load_state_dict(two.state_dict())
    found = fit(MeanRow(), data[2:3].flatten(0, 1), one, accumulate_grad_batches=2).of("grad/variance")
    assert_figures(found[-1], expected(*data[:3].mean(2), size=4))


# ---- output ---------------------------------------------------------------------------------------------------------


def read(folder: Path) -> Any:
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    return events


@pytest.mark.parametrize("matplotlib", [True, False])
def test_what_is_in_tensorboard(matplotlib: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not matplotlib:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    module, watch = make(GradeSTE), GradientVariance(probe_every_n_steps=2, prompts=3, draws=2)
    logger = TensorBoardLogger(tmp_path, name="", version="")
    fit(module, batches(8, repeat=1), watch, logger=logger, accumulate_grad_batches=2)
    events = read(tmp_path)
    tags = events.Tags()
    passive = {f"grad/{name}" for name in PASSIVE | SHAPE}
    both = PASSIVE | {f"sampling_{name}" for name in ENDS | {"relative_std", "variance"}}
    both |= {"squared_norm", "prompt_variance"}
    probes = {f"{group}/{name}" for group in ("probe", "probe_adam") for name in both}
    layers = {layer_of(name) for name, p in module.named_parameters() if p.requires_grad}
    assert {"policy.model.model.embed_tokens", "policy.model.model.layers.0", "policy.model.lm_head"} < layers
    each = {f"probe/{name}/{layer}" for name in ("variance", "relative_std") for layer in layers}
    assert {tag for tag in tags["scalars"] if tag.startswith(("grad/", "probe"))} == passive | probes | each
    assert [e.step for e in events.Scalars("probe/variance")] == [0, 2]
    assert [e.step for e in events.Scalars("probe_adam/variance")] == [2]
    assert [e.step for e in events.Scalars("grad/norm")] == [0, 1, 2, 3]
    assert events.Scalars("grad/norm")[-1].value == pytest.approx(watch.metrics["grad/norm"])
    total = sum(events.Scalars(f"probe/variance/{layer}")[0].value for layer in layers)
    assert total == pytest.approx(events.Scalars("probe/variance")[0].value, rel=1e-4)
    assert tags["images"] == (["probe/noise"] if matplotlib else [])
    if matplotlib:
        images = events.Images("probe/noise")
        assert [image.step for image in images] == [0, 2]
        assert images[0].encoded_image_string[1:4] == b"PNG"


def test_without_a_logger() -> None:
    """The figures are in `metrics`, and in Lightning's, where a checkpoint or early stopping may monitor them."""
    watch = GradientVariance(probe_every_n_steps=1)
    run = trainer(callbacks=[watch], log_every_n_steps=1)
    run.fit(MeanRow(NOISE), DataLoader(list(rows(2, 4)), batch_size=None))  # type: ignore[arg-type]
    assert {"grad/norm", "probe/variance", "probe/variance/first"} < set(watch.metrics)
    found = {name: float(value) for name, value in run.callback_metrics.items() if name != "loss"}
    assert found == pytest.approx(watch.metrics, rel=1e-6, nan_ok=True)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("weight", "weight"),
        ("net.weight", "net"),
        ("net.3.weight", "net.3"),
        ("model.layers.11.mlp.experts.2.up.weight", "model.layers.11"),
        ("model.norm_2.weight", "model.norm_2"),
    ],
)
def test_the_layer_of_a_parameter(name: str, layer: str) -> None:
    assert layer_of(name) == layer


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    "history",
    [[(0, NAN, 0.0, INF)], [(0, NAN, NAN, NAN), (5, 2.0, 1.0, INF)], [(0, 0.0, 0.0, 0.0)], [(0, 1.0, 0.5, 2.0)]],
    ids=str,
)
def test_a_figure_of_anything(history: list[Any]) -> None:
    figure = Figure(layout="constrained")
    draw_noise(figure, history, {"net.0": (1.0, NAN), "net.1": (0.5, -0.1)})
    FigureCanvasAgg(figure).draw()  # type: ignore[no-untyped-call]
    left, right = figure.axes
    assert [text.get_text() for text in right.get_yticklabels()] == ["0", "1"]
    bars = [(bar.get_y() + 0.4, bar.get_width()) for bar in cast(Any, right.patches)]
    assert bars == [(1, 1.0), (0, 0.5), (1, 0.0), (0, 0.0)]
    assert left.get_xlabel() == "optimizer step"


def test_layers_whose_short_names_are_the_same_keep_their_bars() -> None:
    figure = Figure(layout="constrained")
    draw_noise(figure, [(0, 1.0, 0.5, 2.0)], {"a": (1.0, 0.0), "a.a": (2.0, 0.0)})
    assert [bar.get_width() for bar in cast(Any, figure.axes[1].patches)][:2] == [1.0, 2.0]


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [("window", 1, 2), ("probe_every_n_steps", -1, 0), ("prompts", 1, 2), ("draws", 1, 2), ("sketch", 0, 1)],
)
def test_arguments(name: str, value: int, least: int) -> None:
    with pytest.raises(InputError, match=rf"^gradient_variance\.{name} = {value}: must be {least} or more$"):
        GradientVariance(**{name: value})
    GradientVariance(**{name: least})


class ByHand(MeanRow):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


def test_a_module_that_optimizes_by_hand() -> None:
    with pytest.raises(InputError, match=r"ByHand sets automatic_optimization = False.*leave the callback out"):
        fit(ByHand(), rows(1, 2), GradientVariance())


def test_strategies_that_have_no_whole_gradients() -> None:
    run: Any = SimpleNamespace(strategy=object.__new__(FSDPStrategy))
    with pytest.raises(InputError, match=r"probe_every_n_steps = 5.*FSDPStrategy.*set 0, or use ddp"):
        GradientVariance(probe_every_n_steps=5).on_fit_start(run, MeanRow())


class OfTexts(MeanRow):
    """Its batches are texts."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(rows(2, seed=batch_idx), batch_idx)


def test_batches_whose_rows_cannot_be_counted() -> None:
    """There is no noise scale in rows, and nothing to divide for a probe."""
    data = [["a", "b"]] * 4
    found = fit(OfTexts(), data, GradientVariance(), accumulate_grad_batches=2).of("grad/variance")[-1]
    steps = torch.stack([rows(2, seed=i).mean(0) for i in range(4)]).unflatten(0, (2, 2))
    truth = expected(*steps, size=4)
    assert math.isnan(found["grad/noise_scale"])
    del truth["grad/noise_scale"]
    assert_figures(found, truth)
    with pytest.raises(ValueError, match=r"list without a tensor: its rows cannot be counted"):
        fit(OfTexts(), data, GradientVariance(probe_every_n_steps=1))


@pytest.mark.parametrize("output", [None, {"loss": None}, 1.0], ids=str)
def test_a_probe_of_a_step_without_a_loss(output: Any) -> None:
    class Nothing(MeanRow):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return output

    with pytest.raises(InputError, match=r"Nothing\.training_step returned no loss to differentiate"):
        fit(Nothing(), rows(1, 2), GradientVariance(probe_every_n_steps=1))


if __name__ == "__main__":
    work(Path(sys.argv[1]))
