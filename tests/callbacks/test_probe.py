"""Draws of a probe: sketches, seeds, training steps of any kind, layers."""

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from grade_lightning.callbacks.gradient_variance import GradientVariance
from grade_lightning.callbacks.probe import layer_of
from grade_lightning.errors import InputError
from tests.callbacks.watching import MeanRow, assert_figures, expected, fit, probed, rows

pytestmark = pytest.mark.usefixtures("own_random_state")


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
