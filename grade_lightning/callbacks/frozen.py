"""Run training steps as if they had never been: everything that they may change is put back."""

import random
import types
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Queue
from threading import Thread
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger, Logger
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

_OPAQUE = (
    *(type, types.ModuleType, types.FunctionType, types.MethodType, types.BuiltinFunctionType, Trainer),
    *(Logger, SummaryWriter, Queue, Thread),  # other threads are at work on them
)


@contextmanager
def frozen(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """What happens inside leaves no trace in the module, the random states and the logs.

    Parameters and their gradients are not looked at: run backward passes by `torch.autograd.grad`. What lives
    outside of the module (files, other processes, generators of Python's `yield` kind) is not put back either.
    """
    loggers, states = trainer.loggers, Snapshot(module)
    random_states = _collect_rng_states()  # `isolate_rng` forgets them at an exception
    try:
        trainer.loggers = [DummyLogger() for _ in loggers]
        # found before the class's own; the snapshot removes them again
        vars(module).update(log=_ignore, log_dict=_ignore)
        yield
    finally:
        trainer.loggers = loggers
        _set_rng_states(random_states)
        states.restore()


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
        held: list[object] = []
        if isinstance(value, Tensor):
            self._remember_tensor(value)
        elif isinstance(value, np.ndarray):
            copy = value.copy()
            self._undo.append(lambda: np.copyto(value, copy) if value.flags.writeable else None)
            held = list(value.flat) if value.dtype.hasobject else []
        elif isinstance(value, torch.Generator):
            state = value.get_state()
            self._undo.append(lambda: value.set_state(state))
        elif isinstance(value, random.Random):
            version = value.getstate()
            self._undo.append(lambda: value.setstate(version))
        elif isinstance(value, np.random.RandomState):
            old = value.get_state()
            self._undo.append(lambda: value.set_state(old))
        elif isinstance(value, np.random.Generator):
            bits = value.bit_generator.state
            self._undo.append(lambda: setattr(value.bit_generator, "state", bits))
        elif isinstance(value, (list, deque)):
            held = list(value)
            self._undo.append(lambda rows=list(value): _refill(value.clear, value.extend, rows))
        elif isinstance(value, set):
            held = list(value)
            self._undo.append(lambda members=set(value): _refill(value.clear, value.update, members))
        elif isinstance(value, (tuple, frozenset)):
            held = list(value)
        elif isinstance(value, dict):
            held = self._remember_items(value)
        if hasattr(value, "__dict__"):
            held = held + self._remember_items(vars(value))
        return held + self._remember_slots(value)

    def _remember_tensor(self, value: Tensor) -> None:
        # its version would not tell: batch norm and `.data` do not move it
        same, copy = value.detach(), value.detach().clone()

        def undo() -> None:
            with torch.no_grad():
                if value.shape != same.shape or (value.layout == torch.strided and value.data_ptr() != same.data_ptr()):
                    value.data = same
                if not torch.equal(same, copy):
                    same.copy_(copy)

        self._undo.append(undo)

    def _remember_items(self, value: dict[Any, Any]) -> list[object]:
        items = dict(value)

        def undo() -> None:
            if list(value) != list(items) or any(value[key] is not item for key, item in items.items()):
                _refill(value.clear, value.update, items)

        self._undo.append(undo)
        return list(items.values())

    def _remember_slots(self, value: object) -> list[object]:
        slots = [
            slot
            for kind in type(value).__mro__
            for slot in vars(kind).values()
            if isinstance(slot, types.MemberDescriptorType) and slot.__objclass__ is kind and "__slots__" in vars(kind)
        ]
        held = [(slot, slot.__get__(value)) for slot in slots if _is_set(slot, value)]

        def undo() -> None:
            for slot in slots:
                if _is_set(slot, value):
                    slot.__delete__(value)
            for slot, item in held:
                slot.__set__(value, item)

        if slots:
            self._undo.append(undo)
        return [item for _, item in held]


def _is_set(slot: types.MemberDescriptorType, value: object) -> bool:
    try:
        slot.__get__(value)
    except AttributeError:
        return False
    return True


def _refill(clear: Callable[[], None], fill: Callable[[Any], None], content: Any) -> None:
    clear()
    fill(content)
