"""Run training steps as if they had never been: everything that they may change is put back."""

import random
import types
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

_OPAQUE = (type, types.ModuleType, types.FunctionType, types.MethodType, types.BuiltinFunctionType, Trainer)


@contextmanager
def frozen(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """What happens inside leaves no trace in the module, the random states and the logs.

    Parameters and their gradients are not looked at: run backward passes by `torch.autograd.grad`. What lives
    outside of the module (files, other processes, generators of Python's `yield` kind) is not put back either.
    """
    loggers, states = trainer.loggers, Snapshot(module)
    with isolate_rng():
        try:
            trainer.loggers = [DummyLogger() for _ in loggers]
            # found before the class's own; the snapshot removes them again
            vars(module).update(log=_ignore, log_dict=_ignore)
            yield
        finally:
            states.restore()
            trainer.loggers = loggers


def _ignore(*args: Any, **kwargs: Any) -> None:
    pass


class Snapshot:
    """The state of a module that is no parameter: buffers, attributes, containers, metrics, generators, modes.

    Follows attributes, containers and objects to any depth. Tensors and arrays are copied; everything is put
    back in place, so that others who hold it see the same.

    Args:
        root: a module, or any object.

    Example:
        >>> module = nn.BatchNorm1d(2)
        >>> before = Snapshot(module)
        >>> _ = module(torch.randn(4, 2))
        >>> int(module.num_batches_tracked)
        1
        >>> before.restore()
        >>> int(module.num_batches_tracked)
        0
    """

    def __init__(self, root: object) -> None:
        self._undo: list[Callable[[], object]] = []
        self._seen: dict[int, object] = {}
        queue: list[object] = [root]
        while queue:
            value = queue.pop()
            if id(value) not in self._seen and not isinstance(value, (_OPAQUE, nn.Parameter)):
                self._seen[id(value)] = value  # kept alive, so that no other object gets its id
                queue.extend(self._remember(value))

    def restore(self) -> None:
        """Put everything back."""
        for undo in self._undo:
            undo()

    def _remember(self, value: Any) -> list[object]:
        """Note how to put a value back; return what it holds."""
        if isinstance(value, Tensor):
            self._remember_tensor(value)
        elif isinstance(value, np.ndarray):
            copy = value.copy()
            self._undo.append(lambda: np.copyto(value, copy))
        elif isinstance(value, torch.Generator):
            state = value.get_state()
            self._undo.append(lambda: value.set_state(state))
        elif isinstance(value, random.Random):
            version = value.getstate()
            self._undo.append(lambda: value.setstate(version))
        elif isinstance(value, np.random.Generator):
            bits = value.bit_generator.state
            self._undo.append(lambda: setattr(value.bit_generator, "state", bits))
        elif isinstance(value, (list, deque)):
            rows = list(value)
            self._undo.append(lambda: _refill(value.clear, value.extend, rows))
            return rows
        elif isinstance(value, set):
            members = set(value)
            self._undo.append(lambda: _refill(value.clear, value.update, members))
        elif isinstance(value, tuple):
            return list(value)
        elif isinstance(value, dict):
            return self._remember_items(value)
        held = self._remember_items(vars(value)) if hasattr(value, "__dict__") else []
        return held + self._remember_slots(value)

    def _remember_tensor(self, value: Tensor) -> None:
        copy = value.detach().clone()
        version = None if value.is_inference() else value._version

        def undo() -> None:
            if version is None or value._version != version:
                with torch.inference_mode(version is None), torch.no_grad():
                    value.copy_(copy)

        self._undo.append(undo)

    def _remember_items(self, value: dict[Any, Any]) -> list[object]:
        items = dict(value)

        def undo() -> None:
            if list(value) != list(items) or any(value[key] is not item for key, item in items.items()):
                _refill(value.clear, value.update, items)

        self._undo.append(undo)
        return list(items.values())

    def _remember_slots(self, value: object) -> list[object]:
        names = [
            name
            for kind in type(value).__mro__
            for name in [getattr(kind, "__slots__", ())]
            for name in ([name] if isinstance(name, str) else name)
            if name not in ("__dict__", "__weakref__")
            and isinstance(kind.__dict__.get(name), types.MemberDescriptorType)
        ]
        held = {name: getattr(value, name) for name in names if hasattr(value, name)}

        def undo() -> None:
            for name, item in held.items():
                object.__setattr__(value, name, item)

        if held:
            self._undo.append(undo)
        return list(held.values())


def _refill(clear: Callable[[], None], fill: Callable[[Any], None], content: Any) -> None:
    clear()
    fill(content)
