"""How far off a preflight's estimate of the memory is, and that nothing is trained."""

from importlib import import_module
from itertools import accumulate
from typing import Any

import pytest
from lightning.pytorch import Callback
from torch.profiler import ProfilerActivity, profile

from grade_lightning.functional.vocabulary import ELEMENTS, KEPT
from grade_lightning.modules import AlignmentModule
from tests.cli.conftest import Shelf, assert_same, full_and_lora
from tests.cli.preflight.conftest import FULL, METHODS, Look, arguments, cell
from tests.conftest import VOCABULARY, mostly_slow

config = import_module("grade_lightning_cli.config")
preflight = import_module("grade_lightning_cli.preflight").preflight


@full_and_lora
def test_what_does_not_depend_on_the_batch_is_exact(lora: list[str], look: Look, shelf: Shelf) -> None:
    out, memory = look(*shelf.all, *lora)
    policy, reward, adapters = 7920, 4785, 2 * 2 * (16 + 48) if lora else 0
    trained = adapters or policy
    assert cell(out, "policy") == f"{trained:,}"
    assert memory.parts["policy"] == 4 * (policy + adapters)
    assert memory.parts.get("reference") == (None if lora else 4 * policy)
    assert memory.parts["reward"] - 4 * reward in (0, 64 * 64)  # with a mask, where the model has one
    assert memory.parts["gradients"] == 4 * trained
    tensors = 4 if lora else 28
    assert memory.parts["optimizer state"] == 2 * 4 * trained + 4 * tensors  # AdamW: two moments, and its count


def test_nothing_is_trained(shelf: Shelf) -> None:
    cli = config.build([*shelf.all, "--model.optimizer.weight_decay=0.5", "--model.optimizer.lr=1"])
    cli.model.configure_model()
    before = {name: value.clone() for name, value in cli.model.state_dict().items()}
    preflight(cli.trainer, cli.model, cli.datamodule, None)
    assert_same(cli.model.state_dict(), before)


@pytest.mark.slow
def test_any_optimizer(look: Look, shelf: Shelf) -> None:
    _, memory = look(*shelf.all, "--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.1")
    assert memory.parts["optimizer state"] == 0


class Watch(Callback):
    """The most bytes that were allocated in a step of a real run beyond weights and optimizer state."""

    def __init__(self, step: int) -> None:
        self.steps_to_come = step
        self.peak = 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.steps_to_come == 0:
            self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self.profile.start()
            for parameter in pl_module.parameters():
                if parameter.grad is not None:
                    parameter.grad = parameter.grad.clone()  # it sees the end only of what it saw made

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.steps_to_come == 0:
            self.profile.stop()
            results: Any = self.profile.profiler
            events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
            bytes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
            self.peak = max(accumulate(bytes))
        self.steps_to_come -= 1


@pytest.mark.parametrize("kept", mostly_slow([KEPT["cpu"], 20 * VOCABULARY], 20 * VOCABULARY))
@pytest.mark.parametrize("method", mostly_slow(["GradeSTE", "Grade", "PPO", "SupervisedFineTuning"], "PPO"))
def test_the_estimate_of_a_larger_batch(
    method: str, kept: int, look: Look, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From two small batches to four times the larger, beside the profiler's count in a real run of such texts.

    Whether all logits are kept between two passes or a few, which do not grow with the batch.
    """
    monkeypatch.setitem(KEPT, "cpu", kept)
    monkeypatch.setitem(ELEMENTS, "cpu", 12 * VOCABULARY)  # a tiny model fills a chunk, too
    full = [arg for arg in FULL if issubclass(METHODS[method], AlignmentModule) or "sampler" not in arg]
    args = [*arguments(shelf, method), *full, "--data.batch_size=32", "--data.prompt_size=32", "--data.reward_size=0"]
    _, memory = look(*args)
    cli = config.build([*args, "--trainer.max_steps=5", "--trainer.limit_val_batches=0"])
    watch = Watch(step=cli.model.batching.steps_per_batch)  # the first of the second window, or the second
    cli.trainer.callbacks = [watch]
    cli.trainer.logger = None
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    measured = watch.peak + sum(amount for part, amount in memory.parts.items() if part != "gradients")
    assert memory.total(32) == pytest.approx(measured, rel=0.01)
