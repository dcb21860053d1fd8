"""Two processes: their gradients before they are averaged, probes of the prompts of both, and training as it was."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.futures import Future
from torch.utils.data import DataLoader

from grade_lightning.callbacks.gradient_variance import GradientVariance
from grade_lightning.methods import GRPO
from grade_lightning.modules import AlignmentModule
from tests.callbacks.watching import (
    NOISE,
    MeanRow,
    assert_figures,
    assert_known,
    assert_logged_alike,
    assert_probed,
    fit,
    fit_windows,
    rows,
    undisturbed,
    windows,
)
from tests.methods.toy_task import (
    Recorder,
    assert_same,
    batches,
    make,
    trainer,
    weights,
)

pytestmark = [pytest.mark.usefixtures("own_random_state"), pytest.mark.slow]

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
        [sys.executable, "-m", "tests.callbacks.test_gradient_variance_processes", str(folder)],
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


if __name__ == "__main__":
    work(Path(sys.argv[1]))
