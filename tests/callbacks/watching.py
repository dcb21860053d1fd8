"""Modules whose gradients have a known covariance, what a watched run logs, and what it should."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.loggers import Logger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.utils.data import DataLoader

from grade_lightning.callbacks.gradient_variance import GradientVariance
from tests.functional.gaussians import assert_unbiased
from tests.methods.toy_task import trainer

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


# ---- passive --------------------------------------------------------------------------------------------------------

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


# ---- probes ---------------------------------------------------------------------------------------------------------

NOISE = 0.6


def probed(batch: Tensor, blocks: int = 0) -> dict[str, float]:
    """Of a batch without noise, in blocks of as many rows (else each row): all scatter is that of the rows."""
    blocks = blocks or len(batch)
    size = len(batch) // blocks
    means = batch[: blocks * size].double().unflatten(0, (blocks, size)).mean(1)
    spread = float(means.var(0).sum())
    variance = spread * size / len(batch)  # of the mean of all rows
    return {"squared_norm": float(means.mean(0).square().sum()) - spread / blocks, "variance": variance}


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
        torch.testing.assert_close(column(name).square(), ratio_of(column, name))
    ratio = column("relative_std").square()
    torch.testing.assert_close(column("snr"), 1 / ratio)
    torch.testing.assert_close(column("cosine"), 1 / (1 + ratio))
    torch.testing.assert_close(column("noise_scale"), ratio * size)
    told = [(i, *(x[f"probe/relative_std{end}"] for end in ("", "_low", "_high"))) for i, x in enumerate(found)]
    assert history == told


def ratio_of(column: Callable[[str], Tensor], name: str) -> Tensor:
    variance = column("variance" if name == "relative_std" else "sampling_variance")
    return variance / column("squared_norm")


# ---- logs -----------------------------------------------------------------------------------------------------------


def undisturbed(step: dict[str, float]) -> dict[str, float]:
    """What is logged, but for our own figures and the clock."""
    clock = {"train/tokens_per_second", "tok/s"}
    return {n: x for n, x in step.items() if n not in clock and n.split("/")[0] not in ("grad", "probe", "probe_adam")}


def assert_logged_alike(one: list[dict[str, float]], two: list[dict[str, float]]) -> None:
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=0, abs=0, nan_ok=True)


def read(folder: Path) -> Any:
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    return events
