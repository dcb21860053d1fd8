"""Passive figures: gradients of a known covariance, micro-batches that are missing, parameters that do not count."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn

from grade_lightning.callbacks.gradient_variance import GradientVariance
from tests.callbacks.watching import (
    PASSIVE,
    ROWS,
    SHAPE,
    MeanRow,
    assert_figures,
    assert_known,
    expected,
    fit,
    fit_windows,
    probed,
    rows,
    windows,
)

pytestmark = pytest.mark.usefixtures("own_random_state")


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


# ---- precision ------------------------------------------------------------------------------------------------------


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
