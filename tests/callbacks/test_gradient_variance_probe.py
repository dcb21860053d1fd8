"""Figures of probes: known covariances of sampling and of prompts, when there are probes, and of which rows."""

import math
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from grade_lightning.callbacks.gradient_variance import GradientVariance
from grade_lightning.methods import DPO, GRPO, PPO, GradeSTE, Reinforce
from grade_lightning.modules import AlignmentModule
from grade_lightning.selection import Selection
from tests.callbacks.watching import NOISE, MeanRow, assert_figures, assert_probed, fit, probed, rows
from tests.conftest import VOCABULARY
from tests.methods.toy_task import (
    batches,
    make,
)

pytestmark = pytest.mark.usefixtures("own_random_state")


@pytest.mark.parametrize(
    ("count", "prompts", "draws", "accumulate"),
    [
        (13, 6, 2, 1),
        pytest.param(13, 6, 2, 3, marks=pytest.mark.slow),
        pytest.param(8, 9, 3, 1, marks=pytest.mark.slow),
    ],
    ids=["two rows in a block and one left", "three micro-batches", "fewer rows than blocks"],
)
def test_a_probe_of_a_known_covariance(count: int, prompts: int, draws: int, accumulate: int) -> None:
    watch = GradientVariance(probe_every_n_steps=1, prompts=prompts, draws=draws, sketch=None)
    memory = fit(MeanRow(NOISE), rows(60 * accumulate, count), watch, accumulate_grad_batches=accumulate)
    assert_probed(memory.of("probe/variance"), count * accumulate, watch.history)


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


@pytest.mark.parametrize(
    ("epochs", "minibatches", "accumulate"),
    [(2, 2, 1), *(pytest.param(*v, marks=pytest.mark.slow) for v in [(2, 1, 2), (4, 1, 1), (1, 1, 2)])],
    ids=str,
)
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


class Spare(Selection):
    """Two further rows for each that is needed, and no use for them."""

    spare = 2


@pytest.mark.slow
def test_rows_that_are_spare_are_in_no_block_and_in_no_step() -> None:
    """Of twelve rows four are trained on: the first of each block of three, so the figures are those of these four."""
    every = next(iter(batches(1)))
    used = {name: every[name][::3] for name in ("input_ids", "attention_mask")} | {"columns": {}}
    found = []
    for batch, selection in ((every, Spare()), (used, None)):
        watch = GradientVariance(probe_every_n_steps=1, prompts=4, draws=2, sketch=None)
        module = make(GRPO, num_generations=4, selection=selection)
        (figures,) = fit(module, [batch], watch).of("probe/variance")
        found.append({name: value for name, value in figures.items() if name.startswith("probe/")})
    with_spare, without = found
    assert without["probe/variance"] > 0
    assert with_spare == pytest.approx(without, nan_ok=True)


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
        opposing = {"probe/opposing_share", "probe/alignment_ratio", "probe/least_cosine"}  # of the plain metric alone
        plain = {name for name in found[step] if "_adam" not in name and name.count("/") == 1}
        assert {name.replace("_adam", "") for name in found[step] if "_adam" in name} == plain - opposing


def test_other_optimizers_have_no_metric_of_adam() -> None:
    memory = fit(MeanRow(), rows(3, 4), GradientVariance(probe_every_n_steps=1))
    assert not [name for _, figures in memory.seen for name in figures if name.startswith("probe_adam")]


# ---- of our methods -------------------------------------------------------------------------------------------------


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
