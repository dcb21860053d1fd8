"""One rollout behind: what is trained on when, that both happen at once, and that a resumed run is the run."""

import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from grade_lightning.corrections import EngineCorrection
from grade_lightning.errors import InputError
from grade_lightning.methods import DAPO, RLOO, Grade, GradeSTE
from grade_lightning.policies import Policy
from grade_lightning.records import Prompts, Rollout
from grade_lightning.rewards import ClassifierReward
from grade_lightning.rollouts import Distribution, Sampler
from tests.methods.toy_task import assert_same, trainer, weights
from tests.modules.toys import Prescribed, Watch, build, loader, plain, prompts

pytestmark = pytest.mark.usefixtures("own_random_state")

ORDER = [0, 0, 1, 2]
"""Which batch each of four steps trains on."""


class Aged(Prescribed):
    """Remembers the age of the weights that it was handed."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []

    def sync(self, policy: Policy, step: int) -> None:
        self.steps.append(step)


def make(method: Any = RLOO, engine: Any = None, **kwargs: Any) -> Any:
    settings: dict[str, Any] = {"correction": EngineCorrection(math.inf, "sequence")}
    sampler = Sampler(12, engine=engine or Aged(), one_behind=True)
    settings |= {"beta": 0.1} if method is GradeSTE else plain(method)
    return build(method, **settings | {"sampler": sampler} | kwargs)


def windows(method: Any = RLOO) -> list[dict[str, Any]]:
    return [prompts(4, 1 if method is GradeSTE else 4, seed) for seed in range(4)]


class Trained(Callback):
    """The completions of each step."""

    def __init__(self) -> None:
        self.completions: list[list[str]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.completions.append(pl_module.last_rollout[0].completions)


@pytest.mark.parametrize("method", [RLOO, GradeSTE])
def test_each_step_trains_on_the_batch_before(method: Any) -> None:
    """With weights of the step before: the engine is off from the second step on, and is corrected."""
    module, trained, watch = make(method), Trained(), Watch()
    given = windows(method)
    trainer(callbacks=[trained, watch], log_every_n_steps=1).fit(module, loader(*given))
    rows = [[row for group in window["columns"]["completions"] for row in group] for window in given]
    texts = [[module.tokenizer.decode(row) for row in window] for window in rows]
    assert trained.completions == [texts[i] for i in ORDER]
    assert module.sampler.engine.steps == [0, 1, 2, 3]
    off = [abs(step["train/engine_gap"]) for step in watch.logged]
    assert off[0] < 1e-6
    assert min(off[1:]) > 1e-4
    assert watch.logged[3]["train/engine_weight"] != pytest.approx(1, abs=1e-5)


class Elsewhere(Prescribed):
    """Draws in a thread, from the second batch on only while a step is trained."""

    def __init__(self, meeting: threading.Barrier) -> None:
        super().__init__()
        self.meeting = meeting
        self.drawing = False

    def sync(self, policy: Policy, step: int) -> None:
        assert not self.drawing  # with other weights than it began with

    def start(self, policy: Policy, distribution: Distribution, prompts: Prompts) -> Callable[[], Rollout]:
        self.drawing = True
        rollout, found = self.generate(policy, distribution, prompts), []

        def draw(first: bool) -> None:
            if not first:
                self.meeting.wait(60)
            found.append(rollout)

        thread = threading.Thread(target=draw, args=(self.calls == 1,))
        thread.start()

        def wait() -> Rollout:
            thread.join()
            self.drawing = False
            return found[0]

        return wait


class Meeting(Callback):
    """The optimizer steps when the next batch is being drawn, and is not drawn yet."""

    def __init__(self, meeting: threading.Barrier) -> None:
        self.meeting = meeting

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step:
            self.meeting.wait(60)


def test_both_happen_at_once() -> None:
    """Neither ends before it has met the other."""
    meeting = threading.Barrier(2)
    trainer(callbacks=[Meeting(meeting)]).fit(make(engine=Elsewhere(meeting)), loader(*windows()))
    assert not meeting.broken


@pytest.mark.parametrize("method", [RLOO, GradeSTE])
def test_a_resumed_run_is_the_run(method: Any, tmp_path: Path) -> None:
    """What is drawn and not yet trained on is in the checkpoint."""
    save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    whole, given = make(method), windows(method)
    trainer(callbacks=[save], enable_checkpointing=True, max_steps=4).fit(whole, loader(*given))
    resumed = make(method)
    rest = loader(*given[2:], *given[:2])  # a plain loader begins anew
    trainer(max_steps=4).fit(resumed, rest, ckpt_path=tmp_path / "step=2.ckpt", weights_only=True)
    assert resumed.global_step == 4
    assert resumed.sampler.engine.steps == [2, 3]
    assert_same(weights(resumed), weights(whole))


def test_what_cannot_work_is_named() -> None:
    with pytest.raises(InputError, match=r"one_behind: Grade needs completions of the policy as it is"):
        Grade(sampler=Sampler(one_behind=True), reward=ClassifierReward()).configure_model()
    with pytest.raises(InputError, match=r"one_behind.*chooses prompts"):
        make(DAPO, max_retries=1)
    with pytest.raises(InputError, match=r"one_behind: draws whole batches"):
        Sampler(one_behind=True, at_once=4)
    with pytest.warns(UserWarning, match=r"one rollout old and nothing corrects that"):
        make(correction=None)


def test_an_estimate_beside_the_training_has_its_own_completions() -> None:
    module, given = make(), windows()
    found = [module.collect(window).rollout.completion_ids for window in given[:2]]
    assert not torch.equal(*found)
