"""What becomes of the figures: checkpoints, TensorBoard, a drawing; and arguments that cannot work."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import FSDPStrategy
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import DataLoader

from grade_lightning.callbacks.gradient_variance import GradientVariance
from grade_lightning.callbacks.noise_figure import draw_noise
from grade_lightning.callbacks.probe import layer_of
from grade_lightning.errors import InputError
from grade_lightning.methods import GradeSTE
from tests.callbacks.watching import (
    ENDS,
    NOISE,
    PASSIVE,
    SHAPE,
    MeanRow,
    Memory,
    assert_figures,
    expected,
    fit,
    read,
    rows,
)
from tests.conftest import mostly_slow
from tests.methods.toy_task import (
    batches,
    make,
    trainer,
)

pytestmark = pytest.mark.usefixtures("own_random_state")

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


@pytest.mark.parametrize("matplotlib", mostly_slow([True, False], True))
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
    probes |= {f"probe/{name}" for name in ("opposing_share", "least_cosine", "alignment_ratio")}
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
