"""FSDP2 for modules that call parts of their network by themselves: `--trainer.strategy fsdp2`."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from grade_lightning.distributed import gather_full_state
from grade_lightning.errors import InputError


class FSDP2(ModelParallelStrategy):
    """Spread weights, gradients and optimizer states of what is trained over all processes.

    Weights are gathered when a step begins and held until its backward pass is over, layer by layer. So nothing between
    waits for another process: not sampling, of which some end early, nor a method that goes through its graph several
    times. Each process has room for one whole copy of the weights. What is frozen beside the network (reference,
    reward, judges) is whole on each process all the time.

    A checkpoint is the same single file that other strategies write and read.

    Args:
        **kwargs: `process_group_backend` and `timeout`, as for Lightning's ModelParallelStrategy.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(save_distributed_checkpoint=False, **kwargs)
        self._whole: Any = None

    def setup_environment(self) -> None:
        """Every process has data of its own."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        """Shard the module the first time; its steps go through the root, as under DDP."""
        module = self.lightning_module
        assert module is not None
        own = vars(module)  # beside its parts: another Trainer finds it there
        if "_whole" not in own:
            own["_whole"] = _shard(self.precision_plugin.convert_module(module), self.device_mesh["data_parallel"])
        self._whole = own["_whole"]
        super().setup(trainer)
        self.model = self._whole

    def backward(self, closure_loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Free the weights of a layer, and spread its gradient, as soon as it is done."""
        self._whole.set_reshard_after_backward(True)
        loss = super().backward(closure_loss, *args, **kwargs)
        self._whole.set_reshard_after_backward(False)  # a step may differentiate on its own
        return loss

    def on_validation_end(self) -> None:
        """Free the weights."""
        self._free()

    def on_test_end(self) -> None:
        """Free the weights."""
        self._free()

    def on_predict_end(self) -> None:
        """Free the weights."""
        self._free()

    def _free(self) -> None:
        for part in _sharded_parts(self._whole):
            part.reshard()

    # ---- checkpoints: whole tensors ----------------------------------------------------------------------------

    @property
    def lightning_restore_optimizer(self) -> bool:
        """As other strategies."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What the module saves, gathered by all processes on the first."""
        assert self.lightning_module is not None
        return gather_full_state(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The same of an optimizer."""
        return gather_full_state(optimizer.state_dict())

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read the file, on each process."""
        return super(ModelParallelStrategy, self).load_checkpoint(checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Each process keeps its part."""
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        state = {name: _spread(value, own.get(name)) for name, value in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Each process keeps its part of what has the form of a parameter."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            spread = {
                number: {name: _spread(value, parameters[number]) for name, value in entries.items()}
                for number, entries in state["state"].items()
            }
            optimizer.load_state_dict(state | {"state": spread})


StrategyRegistry.register("fsdp2", FSDP2, description="FSDP2: weights, gradients and optimizer states are spread")


class _Whole(nn.Module):
    """What runs as its forward sees the weights of the module in one piece."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def _shard(module: Any, mesh: DeviceMesh) -> _Whole:
    """Shard in place what is not frozen beside the network: each layer by itself, and the rest together."""
    if any(not p.is_floating_point() for p in module.parameters()):
        raise InputError("--trainer.strategy: fsdp2 does not spread weights of few bits; use ddp")
    frozen = {part for top in module.frozen_modules() for part in top.modules()}
    trained = [part for part in module.modules() if part not in frozen]
    names = {name for part in trained if isinstance(part, PreTrainedModel) for name in part._no_split_modules or ()}
    # a layer that a step goes through several times would send its gradient each time
    layers = [] if module.unrolls else [part for part in trained if type(part).__name__ in names]
    own = {part: {p.dtype for p in part.parameters(recurse=False) if p.requires_grad} for part in trained}
    ((usual, _),) = Counter(dtype for dtypes in own.values() for dtype in dtypes).most_common(1)
    odd = [part for part, dtypes in own.items() if dtypes - {usual}]  # what is reduced together has one type
    whole = _Whole(module)
    ignored = {parameter for part in frozen for parameter in part.parameters()}
    for part in (*odd, *layers, whole):
        fully_shard(part, mesh=mesh, reshard_after_forward=False, ignored_params=ignored)
    for part in _sharded_parts(whole):
        part.set_reshard_after_backward(False, recurse=False)
        part.unshard()  # the first time must not be in inference mode, as evaluation is
        part.reshard()
    return whole


def _sharded_parts(module: Any) -> list[FSDPModule]:
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def _spread(value: Any, like: Any) -> Any:
    if isinstance(like, DTensor) and isinstance(value, Tensor) and value.shape == like.shape:
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return value
