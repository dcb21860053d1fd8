"""Compressed gradients under DDP: of all components the mean, of some their sum in the end; and resumed runs."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from grade_lightning.callbacks import EControl
from grade_lightning.errors import InputError
from tests.cli.ranks import launch

SOME: dict[str, Any] = {"share": 0.2, "eta": 0.2}


@pytest.fixture
def one_process() -> Iterator[None]:
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Alone:
    """A linear layer under DDP of one process, its gradients by a callback's hook."""

    def __init__(self, callback: EControl) -> None:
        self.layer, self.callback = nn.Linear(3, 2).double(), callback
        callback._names = {id(p): name for name, p in self.layer.named_parameters()}
        self.model = DistributedDataParallel(self.layer)
        self.model.register_comm_hook(None, callback._exchange)

    def step(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient that the optimizer gets, and the true one."""
        self.layer.zero_grad()
        self.model(x).square().sum().backward()
        found = torch.cat([p.grad.flatten() for p in self.layer.parameters() if p.grad is not None])
        truth = torch.autograd.grad(self.layer(x).square().sum(), list(self.layer.parameters()))
        self.callback.on_before_optimizer_step(cast(Any, None), cast(Any, None), cast(Any, None))
        return found, torch.cat([g.flatten() for g in truth])

    def errors(self) -> Tensor:
        return torch.cat([self.callback.memories[name]["error"] for name, _ in self.layer.named_parameters()])


def inputs(count: int) -> Tensor:
    return torch.randn(count, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.usefixtures("one_process")
def test_of_all_components_it_is_the_gradient() -> None:
    alone = Alone(EControl(share=1.0))
    for x in inputs(4):
        torch.testing.assert_close(*alone.step(x))


@pytest.mark.usefixtures("one_process")
def test_of_some_components_nothing_is_lost() -> None:
    alone = Alone(EControl(**SOME))
    found, truth = (torch.stack(x) for x in zip(*(alone.step(x) for x in inputs(9)), strict=True))
    assert not torch.allclose(found, truth)
    torch.testing.assert_close(found.sum(0) + alone.errors(), truth.sum(0))


@pytest.mark.usefixtures("one_process")
def test_a_gradient_that_is_not_finite_is_remembered_by_none() -> None:
    alone = Alone(EControl(**SOME))
    first, second = inputs(2)
    alone.step(first)
    before = {name: {key: x.clone() for key, x in memory.items()} for name, memory in alone.callback.memories.items()}
    found, _ = alone.step(torch.full((5, 3), torch.inf, dtype=torch.float64))
    assert not found.isfinite().any()
    for name, memory in alone.callback.memories.items():
        assert all(torch.equal(value, before[name][key]) for key, value in memory.items())
    assert alone.step(second)[0].isfinite().all()


def test_without_ddp_or_with_a_moving_scale_it_is_refused() -> None:
    with pytest.raises(InputError, match=r"^EControl: .*set --trainer.strategy ddp[^\n]*$"):
        Trainer(callbacks=[EControl()], accelerator="cpu", logger=False, max_steps=1).fit(Line(), rows(0))
    scaled = SimpleNamespace(strategy=DDPStrategy(), precision_plugin=SimpleNamespace(scaler=object()))
    with pytest.raises(InputError, match=r"^EControl: .*use bf16-mixed$"):
        EControl().on_fit_start(cast(Any, scaled), Line())


@pytest.mark.parametrize(("name", "value"), [("share", 0.0), ("share", 1.1), ("eta", 1.0), ("eta", -0.1)])
def test_what_is_out_of_range_is_one_line(name: str, value: float) -> None:
    with pytest.raises(InputError, match=rf"^EControl.{name} = {value}: must be [^\n]+$"):
        EControl(**{name: value})


# ---- two processes --------------------------------------------------------------------------------------------------


class Line(LightningModule):
    """Least squares; each process has rows of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 2).double()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = (self.layer(batch) - 1).square().mean()
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def rows(rank: int) -> DataLoader[Any]:
    return DataLoader(list(inputs(6)[rank::2]), batch_size=None)  # type: ignore[arg-type]


class PowerSGD(EControl):
    """The recipe of the docs, which Lightning itself heeds on CUDA alone."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        state = PowerSGDState(process_group=None, matrix_approximation_rank=1, start_powerSGD_iter=2)
        cast(Any, trainer.strategy.model).register_comm_hook(state, compressed)


def compressed(state: Any, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """Under its own name torch refuses it without NCCL."""
    return powerSGD_hook(state, bucket)


def fitted(rank: int, folder: Path, *callbacks: Any, epochs: int = 2, **kwargs: Any) -> dict[str, Any]:
    module = Line()
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        max_epochs=epochs,
        callbacks=list(callbacks),
        default_root_dir=folder,
    )
    trainer.fit(module, rows(rank), **kwargs)
    if epochs == 1:
        trainer.save_checkpoint(folder / "half.ckpt")
        trainer.strategy.barrier()
    return {name: value.clone() for name, value in module.state_dict().items()}


def work(folder: Path) -> None:
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    found = {
        "plain": fitted(rank, folder),
        "all": fitted(rank, folder, EControl(share=1.0)),
        "some": fitted(rank, folder, EControl(**SOME)),
        "PowerSGD": fitted(rank, folder, PowerSGD()),
    }
    fitted(rank, folder, EControl(**SOME), epochs=1)
    found["resumed"] = fitted(rank, folder, EControl(**SOME), ckpt_path=folder / "half.ckpt", weights_only=True)
    torch.save(found, folder / f"{os.environ.get('LOCAL_RANK', '0')}.pt")


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    done = launch("-m", "tests.callbacks.test_error_control", str(tmp_path), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for name, state in one.items():
        for key, value in state.items():
            assert torch.equal(value, two[name][key]), name
    for key, value in one["plain"].items():
        torch.testing.assert_close(one["all"][key], value)
        assert not torch.equal(one["some"][key], value)
        assert not torch.equal(one["PowerSGD"][key], value) or value.dim() == 1  # vectors are sent whole
        assert torch.equal(one["resumed"][key], one["some"][key])


if __name__ == "__main__":
    work(Path(sys.argv[1]))
