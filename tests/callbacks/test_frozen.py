"""What is put back, whatever it is and however it was changed."""

import collections
import queue
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.loggers import CSVLogger, Logger
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from torchmetrics import MeanMetric

from grade_lightning.callbacks.frozen import Snapshot, frozen
from tests.callbacks.runs import Saves, plain
from tests.methods.toy_task import trainer

pytestmark = pytest.mark.usefixtures("own_random_state")


class Holder:
    """Anything with attributes."""

    def __init__(self, **held: Any) -> None:
        vars(self).update(held)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

        def __setattr__(self, name: str, value: Any) -> None: ...


def after(root: Any, change: Callable[[Any], object]) -> Any:
    """The same object, changed and put back."""
    snapshot = Snapshot(root)
    change(root)
    snapshot.restore()
    return root


# ---- tensors and arrays ---------------------------------------------------------------------------------------------


def in_place(tensor: Tensor) -> None:
    tensor.add_(1)


def by_index(tensor: Tensor) -> None:
    tensor[0] = 7


def by_data(tensor: Tensor) -> None:
    """As many moving averages are written; the tensor's version does not tell."""
    tensor.data.sub_(1)


def by_a_view(tensor: Tensor) -> None:
    tensor.view(-1)[1:].zero_()


@pytest.mark.parametrize("change", [in_place, by_index, by_data, by_a_view])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bfloat16], ids=str)
def test_a_tensor_that_is_changed_in_place(change: Callable[[Tensor], None], dtype: torch.dtype) -> None:
    held = torch.tensor([2, 4, 6]).to(dtype)
    view = held[:2]
    root = after(Holder(value=held), lambda root: change(root.value))
    assert root.value is held
    assert held.tolist() == [2, 4, 6]
    assert view.tolist() == [2, 4]  # it was written into, not replaced


def test_a_tensor_that_holds_nan() -> None:
    held = torch.tensor([torch.nan, 1.0])
    after(Holder(value=held), lambda root: root.value.zero_())
    assert held.isnan().tolist() == [True, False]


@pytest.mark.parametrize("change", [lambda x: x.resize_(4).fill_(1), lambda x: setattr(x, "data", torch.ones(3))])
def test_a_tensor_that_gets_another_shape(change: Callable[[Tensor], object]) -> None:
    held = torch.tensor([2.0, 4.0])
    after(Holder(value=held), lambda root: change(root.value))
    assert held.tolist() == [2.0, 4.0]


def test_a_tensor_that_is_replaced_as_well_as_changed() -> None:
    held = torch.tensor([2.0, 4.0])

    def change(root: Holder) -> None:
        root.value.add_(1)
        root.value = root.value * 2

    assert after(Holder(value=held), change).value is held
    assert held.tolist() == [2.0, 4.0]


def test_tensors_that_autograd_knows() -> None:
    """A leaf that is no parameter, and what was computed from one."""
    leaf = torch.tensor([1.0], requires_grad=True)
    computed = leaf * 2

    def change(root: Holder) -> None:
        with torch.no_grad():
            root.leaf.add_(1)
            root.computed.add_(1)

    root = after(Holder(leaf=leaf, computed=computed), change)
    assert (root.leaf.tolist(), root.computed.tolist()) == ([1.0], [2.0])
    assert root.leaf.requires_grad
    (gradient,) = torch.autograd.grad(root.computed, leaf)
    assert gradient.tolist() == [2.0]


def test_inference_tensors() -> None:
    """They have no version, and may be written only in inference mode."""
    with torch.inference_mode():
        held = torch.tensor([2.0, 4.0])

    def change(root: Holder) -> None:
        with torch.inference_mode():
            root.value.add_(1)

    assert after(Holder(value=held), change).value.tolist() == [2.0, 4.0]
    assert held.is_inference()


def test_a_tensor_that_nobody_changed_is_not_written() -> None:
    """An expanded one could not be, and autograd would complain of the others."""
    weight = torch.ones(2, requires_grad=True)
    held = torch.tensor([2.0, 4.0])
    loss = (weight * held).sum()
    after(Holder(expanded=torch.zeros(1).expand(3), held=held), lambda root: None)
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [2.0, 4.0]


def test_arrays() -> None:
    held = np.arange(3.0)
    view = held[:2]

    def change(root: Holder) -> None:
        root.value += 1
        root.value = np.zeros(1)

    assert after(Holder(value=held), change).value is held
    assert held.tolist() == [0, 1, 2]
    assert view.tolist() == [0, 1]


def test_arrays_that_cannot_be_written() -> None:
    held = np.broadcast_to(np.ones(1), 3)
    assert after(Holder(value=held, count=1), lambda root: setattr(root, "count", 2)).count == 1
    assert held.tolist() == [1, 1, 1]


def test_arrays_of_objects() -> None:
    held = np.array([[1], None], dtype=object)
    inner = held[0]

    def change(root: Holder) -> None:
        root.value[1] = 3

    assert after(Holder(value=held), change).value.tolist() == [[1], None]
    assert held[0] is inner


# ---- containers -----------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    one: Any
    two: Any


class Rows(list[Any]):
    """A list that knows more."""


class Table(dict[str, Any]):
    """A dict that knows more."""


def test_containers_in_containers() -> None:
    tensor = torch.zeros(2)
    inner = {"tensor": tensor, "rows": [1, [2, 3]]}
    root = Holder(
        table=inner,
        rows=[inner, "a"],
        last=collections.deque([1, 2, 3], maxlen=3),
        some={1, 2},
        pair=Pair([4], (5, [6])),
        count=collections.Counter("aab"),
        groups=collections.defaultdict(list, a=[1]),
        order=collections.OrderedDict(b=1, a=2),
    )
    held = dict(vars(root))

    def change(root: Holder) -> None:
        root.table["tensor"].add_(1)
        root.table["rows"][1].append(9)
        root.table["new"] = root.table.pop("rows")
        root.rows[1] = "b"
        root.rows.insert(0, None)
        root.last.append(4)
        root.some.symmetric_difference_update({2, 3})
        root.pair.one.clear()
        root.pair.two[1].append(7)
        root.count.update("bbb")
        root.groups["b"].append(2)
        root.groups["a"].append(2)
        root.order.move_to_end("b")
        root.new = 1
        del root.count

    after(root, change)
    assert list(vars(root)) == list(held)
    assert [name for name, value in held.items() if getattr(root, name) is not value] == []
    assert root.table is root.rows[0]
    assert list(inner) == ["tensor", "rows"]
    assert inner["tensor"] is tensor
    assert tensor.tolist() == [0, 0]
    assert inner["rows"] == [1, [2, 3]]
    assert root.rows == [inner, "a"]
    assert (list(root.last), root.last.maxlen) == ([1, 2, 3], 3)
    assert root.some == {1, 2}
    assert root.pair == ([4], (5, [6]))
    assert root.count == {"a": 2, "b": 1}
    assert root.groups == {"a": [1]}
    assert list(root.order.items()) == [("b", 1), ("a", 2)]


def test_members_of_sets_and_values_of_objects() -> None:
    inside, frozen_inside = Holder(count=1), Holder(count=1)

    def change(root: Holder) -> None:
        inside.count, frozen_inside.count = 2, 2

    after(Holder(some={inside}, others=frozenset([frozen_inside])), change)
    assert (inside.count, frozen_inside.count) == (1, 1)


@pytest.mark.parametrize("kind", [Rows, Table])
def test_attributes_of_containers(kind: Callable[[], Any]) -> None:
    held = kind()
    held.count, held.seen = 1, [1]

    def change(root: Holder) -> None:
        root.value.count += 1
        root.value.seen.append(2)
        root.value.new = 1

    after(Holder(value=held), change)
    assert vars(held) == {"count": 1, "seen": [1]}


# ---- objects --------------------------------------------------------------------------------------------------------


class Slots:
    __slots__ = ("__hidden", "count", "later", "seen")

    def __init__(self) -> None:
        self.count, self.seen, self.__hidden = 1, [1], 1

    @property
    def hidden(self) -> int:
        return self.__hidden

    def change(self) -> None:
        self.count, self.__hidden = self.count + 1, self.__hidden + 1
        self.seen.append(2)


class More(Slots):
    """Has slots by its parent, and attributes of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.own = [1]

    def change(self) -> None:
        super().change()
        self.own.append(2)


@pytest.mark.parametrize("kind", [Slots, More])
def test_slots(kind: type[Slots]) -> None:
    held = kind()
    after([held], lambda root: root[0].change())
    assert (held.count, held.seen) == (1, [1])
    assert getattr(held, "own", [1]) == [1]


def test_slots_of_a_private_name() -> None:
    held = Slots()
    after([held], lambda root: root[0].change())
    assert held.hidden == 1


def test_slots_that_were_empty() -> None:
    held = Slots()
    after([held], lambda root: setattr(root[0], "later", 1))
    assert not hasattr(held, "later")


@dataclass
class Data:
    count: int = 1
    seen: list[int] = field(default_factory=lambda: [1])


@dataclass(slots=True)
class SlottedData(Data):
    own: Tensor = field(default_factory=lambda: torch.zeros(1))


@dataclass(frozen=True, slots=True)
class FrozenData:
    seen: list[int]


@pytest.mark.parametrize("kind", [Data, SlottedData])
def test_dataclasses(kind: type[Data]) -> None:
    held = kind()

    def change(root: Holder) -> None:
        root.value.count += 1
        root.value.seen.append(2)
        if isinstance(root.value, SlottedData):
            root.value.own.add_(1)

    after(Holder(value=held), change)
    assert held == kind()


def test_frozen_dataclasses() -> None:
    held = FrozenData([1])
    seen = held.seen
    after((held,), lambda root: root[0].seen.append(2))
    assert held.seen is seen
    assert seen == [1]


def test_what_is_shared_stays_shared_and_circles_end() -> None:
    inner = Holder(seen=[1])
    root = Holder(one=inner, two={"same": inner}, rows=[inner.seen])
    inner.parent = root
    root.rows.append(root.rows)

    def change(root: Holder) -> None:
        root.one.seen.append(2)
        root.one = Holder(seen=[3])
        root.two["same"].parent = None
        root.rows.clear()

    after(root, change)
    assert root.one is root.two["same"] is inner
    assert inner.parent is root
    assert root.rows[0] is inner.seen
    assert root.rows[1] is root.rows
    assert inner.seen == [1]


def test_the_same_id_is_not_taken_for_the_same_object() -> None:
    """Attributes made on the way, as `vars` of an object without any, must not be forgotten while others are read."""
    held = [Holder(count=i) for i in range(200)]

    def change(root: list[Holder]) -> None:
        for item in root:
            item.count += 1

    after(held, change)
    assert [item.count for item in held] == list(range(200))


def test_classes_functions_and_python_modules_are_left_alone() -> None:
    root = Holder(kind=Data, function=in_place, module=random, method=Data().seen.append)
    before = dict(vars(random))
    root = after(root, lambda root: setattr(root, "kind", int))
    assert root.kind is Data
    assert vars(random) == before


def test_what_threads_work_on_is_left_alone(tmp_path: Path) -> None:
    """A queue with its old content waits forever for a thread that has done the work."""
    work: queue.Queue[int] = queue.Queue()
    work.put(1)
    writer = SummaryWriter(tmp_path)

    def change(root: Holder) -> None:
        root.work.get()
        root.work.task_done()
        root.writer.add_scalar("own", 1.0)
        root.writer.flush()

    after(Holder(work=work, writer=writer, logger=CSVLogger(tmp_path)), change)
    assert (work.qsize(), work.unfinished_tasks) == (0, 0)
    writer.close()


# ---- generators -----------------------------------------------------------------------------------------------------

GENERATORS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "torch": (lambda: torch.Generator().manual_seed(0), lambda g: torch.rand(3, generator=g).tolist()),
    "python": (lambda: random.Random(0), lambda g: [g.random(), g.gauss(0, 1)]),
    "numpy": (lambda: np.random.default_rng(0), lambda g: g.random(3).tolist()),
    "numpy's old one": (lambda: np.random.RandomState(0), lambda g: [g.rand(), g.randn()]),
}


@pytest.mark.parametrize("name", GENERATORS)
def test_generators(name: str) -> None:
    new, draw = GENERATORS[name]
    held = new()
    draw(held)
    root = after(Holder(held=[held]), lambda root: draw(root.held[0]))
    truth = new()
    draw(truth)
    assert root.held[0] is held
    assert draw(held) == draw(truth)


# ---- modules --------------------------------------------------------------------------------------------------------


class Net(LightningModule):
    """Holds all that a module can."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
        self.metric = MeanMetric()
        self.register_buffer("cache", None)
        self.average = 0.0
        self.seen: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.body(x).sum())

    def disturb(self) -> None:
        """Everything but the parameters."""
        self.body.train(not self.body.training)
        self.body[2].eval()
        self.train()
        value = self(torch.randn(4, 2))
        self.eval()
        self.metric.update(float(value.detach()))
        self.metric.compute()
        self.register_buffer("more", torch.ones(1))
        self.cache = torch.ones(2)
        self.average = float(value.detach())
        self.seen.append(1.0)
        self.added = nn.Linear(1, 1)
        self.body.append(nn.ReLU())
        self.body[0].register_forward_hook(lambda *_: None)
        self.body[0].weight = nn.Parameter(torch.zeros(3, 2))
        del self.body[1].running_mean
        random.random()
        np.random.rand()
        self.log("inside", 1.0)
        self.log_dict({"inside": 1.0})


def state(module: nn.Module) -> dict[str, Any]:
    buffers = {name: None if x is None else x.tolist() for name, x in module.named_buffers()}
    modes = {name: child.training for name, child in module.named_modules()}
    return {"buffers": buffers, "modes": modes, "names": list(vars(module)), "weights": list(module.parameters())}


def random_state() -> Any:
    kind, keys, *rest = cast(Any, np.random.get_state())
    return random.getstate(), kind, keys.tolist(), rest, torch.get_rng_state().tolist()


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_module_and_the_random_states(training: bool, fails: bool, tmp_path: Any) -> None:
    module = Net().train(training)
    module.body[0].eval()
    loggers: list[Logger] = [CSVLogger(tmp_path), CSVLogger(tmp_path, "two")]
    run = trainer(logger=loggers)
    before, metric = state(module), module.metric
    metric.update(3.0)
    rng = random_state()

    def disturb() -> None:
        with frozen(run, module):
            assert not set(map(id, run.loggers)) & set(map(id, loggers))
            assert len(run.loggers) == 2
            for logger in run.loggers:
                logger.experiment.add_scalar("inside", 1.0)  # type: ignore[attr-defined]
                logger.log_metrics({"inside": 1.0}, 0)
            module.disturb()
            if fails:
                raise KeyError("of the step")

    if fails:
        with pytest.raises(KeyError, match="of the step"):
            disturb()
    else:
        disturb()
    after = state(module)
    assert [id(p) for p in after.pop("weights")] == [id(p) for p in before.pop("weights")]
    assert after == before
    assert (module.average, module.seen, len(module.body)) == (0.0, [], 3)
    assert not module.body[0]._forward_hooks
    assert module.metric is metric
    assert (float(metric.compute()), metric.update_count) == (3.0, 1)
    assert all(one is two for one, two in zip(run.loggers, loggers, strict=True))
    assert not list(tmp_path.rglob("*.csv"))
    assert random_state() == rng


def test_the_random_states_after_an_exception() -> None:
    """Lightning's `isolate_rng` alone forgets them then."""
    module, rng = Net(), random_state()

    def disturb() -> None:
        with frozen(trainer(), module):
            module.disturb()
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        disturb()
    assert random_state() == rng


class Interrupts(Callback):
    """Logs and steps inside."""

    def on_train_batch_start(self, trainer: Any, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        with frozen(trainer, pl_module):
            pl_module.training_step(batch, batch_idx)
            pl_module.log("inside", 1.0)


class Logs(Saves):
    def __init__(self) -> None:
        super().__init__()
        self.metric = MeanMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.metric(float(batch_idx))
        self.log("metric", self.metric, on_step=True, on_epoch=True)
        self.log_dict({"index": float(batch_idx)})
        return super().training_step(batch, batch_idx)


def test_logging_works_afterwards() -> None:
    run = trainer(callbacks=[Interrupts()])
    run.fit(Logs(), plain())
    assert {name: float(value) for name, value in run.callback_metrics.items()} == {
        "metric": 0.5,  # of the epoch: twice inside, twice outside, but only the latter count
        "metric_epoch": 0.5,
        "metric_step": 1.0,
        "index": 1.0,
    }
