"""A run that is killed and goes on is the run that was never killed: every method, bit for bit.

The runs of all methods share one process that imports everything, and are forks of it.
"""

import inspect
import json
import math
import os
import random
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from datasets import Dataset, DatasetDict
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, LearningRateMonitor
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.plugin_event_accumulator import (  # type: ignore[import-untyped]
    EventAccumulator,
)
from tensorboard.util.tensor_util import make_ndarray  # type: ignore[import-untyped]
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import AutoModelForCausalLM

import grade_lightning.methods
from grade_lightning.callbacks import Checkpoint, Completions, GradientVariance
from grade_lightning.data import Source, TextDataModule
from grade_lightning.kl import KL
from grade_lightning.methods import RewardModel, SupervisedFineTuning
from grade_lightning.modules import PolicyGradientModule, TrainableModule
from grade_lightning.policies import Policy
from grade_lightning.rewards import FunctionReward
from grade_lightning.rollouts import Sampler
from tests.conftest import CONFIGS, VOCABULARY, make_model, make_tokenizer
from tests.methods.toy_task import METHODS, Toy

resume = import_module("grade_lightning_cli.resume")  # its name once it is installed

NAMES = sorted(method.__name__ for method in [*METHODS, RewardModel, SupervisedFineTuning])
QUICK = ["PPO"]
STEPS, EVERY, VALIDATE = 11, 3, 4  # checkpoints also in the middle of a window, and after validations


class Words(Source):
    """Texts of eight words, and a label."""

    def load(self) -> DatasetDict:
        rng = random.Random(0)
        texts = [" ".join(f"w{rng.randrange(2, VOCABULARY)}" for _ in range(8)) for _ in range(80)]
        return DatasetDict(train=Dataset.from_dict({"text": texts, "label": [i % 2 for i in range(80)]}))


def noisy(completions: list[str], **_: Any) -> list[float | None]:
    """A reward with dice of its own."""
    return [len(text.split()) + random.random() + numpy.random.rand() for text in completions]


def make(name: str, folder: Path) -> TrainableModule:
    """A method with everything that runs from step to step: dropout, an adaptive β, a baseline, schedules."""
    method = getattr(grade_lightning.methods, name)
    if method is RewardModel:
        return RewardModel(str(folder.parent / "backbone"), hidden=8)
    if method is SupervisedFineTuning:
        return SupervisedFineTuning(Policy(str(folder.parent / "backbone"), dropout=True))
    settings: dict[str, Any] = {"policy": Policy.from_model(make_model("llama"), make_tokenizer())}
    if issubclass(method, PolicyGradientModule):
        settings["kl"] = KL(0.1, target=0.1, horizon=32)
    if "decay" in inspect.signature(method).parameters:
        settings["decay"] = 0.5
    reward = Toy() if method.backpropagates_reward else FunctionReward(noisy)
    optimizer = lambda parameters: torch.optim.Adam(parameters, lr=1e-2)  # noqa: E731
    return method(reward=reward, sampler=Sampler(max_new_tokens=6), optimizer=optimizer, **settings)  # type: ignore[no-any-return]


class Witness(Callback):
    """Writes down what each step was trained on, and from which random state."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        rollout = pl_module.last_rollout[0].ids.tolist() if hasattr(pl_module, "last_rollout") else None
        dice = torch.initial_seed(), torch.rand(1).item(), random.random(), numpy.random.rand()
        seen = {"step": trainer.global_step, "batch": batch["input_ids"].tolist(), "rollout": rollout, "dice": dice}
        with self.path.open("a") as file:
            print(json.dumps(seen), file=file)


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Half:
    """A file whose writer dies after so many bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: bytes) -> int:
        self.room -= len(data)
        if self.room < 0:
            die()
        return int(self.file.write(data))


class Killer(Callback):
    """Kills this process in a step."""

    def __init__(self, where: str, step: int, rng: random.Random) -> None:
        self.where, self.step, self.rng = where, step, rng

    def due(self, trainer: Trainer, where: str) -> bool:
        return self.where == where and trainer.global_step >= self.step

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if self.due(trainer, "within a forward pass"):
            left = self.rng.randrange(10, 60)

            def count(*_: Any) -> None:
                nonlocal left
                left -= 1
                if left == 0:
                    die()

            register_module_forward_pre_hook(count)
        if self.due(trainer, "while a checkpoint is written"):
            save: Callable[..., None] = torch.save
            setattr(torch, "save", lambda what, file: save(what, Half(file, self.rng.randrange(100_000))))  # noqa: B010
        if self.due(trainer, "before a checkpoint is moved"):
            setattr(os, "fsync", die)  # noqa: B010
        if self.due(trainer, LATE):
            move = Path.replace
            setattr(Path, "replace", lambda *paths: die(move(*paths)))  # noqa: B010

    def on_before_optimizer_step(self, trainer: Trainer, *_: Any) -> None:
        if self.due(trainer, "before the optimizer"):
            die()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if self.due(trainer, "after the optimizer"):
            die()

    def on_validation_start(self, trainer: Trainer, *_: Any) -> None:
        if self.due(trainer, "before a validation"):
            die()


KINDS = (
    "within a forward pass",
    "before the optimizer",
    "while a checkpoint is written",
    "after the optimizer",
    "before a checkpoint is moved",
    "before a validation",
)
LATE = "after a checkpoint is moved"  # and before anything else; saved after a validation, here


def run(name: str, folder: Path, *more: Callback) -> None:
    """Fit, from the folder's checkpoint if it has one."""
    torch.set_num_threads(1)
    seed_everything(5, verbose=False)
    start = resume.find_start(str(folder), folder.parent, "fit", []) if folder.exists() else resume.Start()
    fitted = Trainer(
        accelerator="cpu",
        logger=TensorBoardLogger(folder.parent, "", folder.name, default_hp_metric=False, purge_step=start.step),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        max_steps=STEPS,
        val_check_interval=VALIDATE,
        check_val_every_n_epoch=None,
        limit_val_batches=1,
        callbacks=[
            Witness(folder.parent / f"{folder.name}.jsonl"),
            GradientVariance(window=5),
            LearningRateMonitor(),
            Completions(every_n_steps=1),
            *more,
            Checkpoint(every_n_train_steps=None if name == "RLOO" else EVERY),  # else after validations
        ],
    )
    sizes: dict[str, Any] = {"reward_size": 24, "prompt_size": 24, "val_size": 8, "test_size": 8}
    data = TextDataModule(Words(), batch_size=8, max_prompt_tokens=8, max_text_tokens=10, **sizes)
    fitted.fit(make(name, folder), data, ckpt_path=start.checkpoint, weights_only=True)


def fork(function: Callable[..., None], *args: Any) -> int:
    """Run it in a copy of this process.

    Returns:
        The status of its end, as the system has it.
    """
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            function(*args)
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1]


def main(root: Path, names: list[str]) -> None:
    """Each run once without a kill, and once with one."""
    config = CONFIGS["gpt2"]()
    config.resid_pdrop = config.embd_pdrop = 0.3
    AutoModelForCausalLM.from_config(config).save_pretrained(root / "backbone")
    make_tokenizer().save_pretrained(root / "backbone")
    for name in names:
        rng = random.Random(name)
        kind = LATE if name == "RLOO" else KINDS[NAMES.index(name) % len(KINDS)]
        killer = Killer(kind, rng.randrange(EVERY + 1, STEPS - EVERY), rng)
        print(name, kind, killer.step)
        assert fork(run, name, root / f"{name}-whole") == 0
        assert os.WTERMSIG(fork(run, name, root / f"{name}-killed", killer)) == signal.SIGKILL
        assert fork(run, name, root / f"{name}-killed") == 0


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of all methods that were asked for."""
    items = [item for item in request.session.items if item.path == Path(__file__) and hasattr(item, "callspec")]
    names = sorted({item.callspec.params["name"] for item in items})
    root = tmp_path_factory.mktemp("runs")
    repository = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join([repository, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_resume", str(root), *names],
        cwd=root,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return root


def latest(folder: Path) -> dict[str, Any]:
    start = resume.find_start(str(folder), folder.parent, "test", [])
    assert start.checkpoint is not None
    content: dict[str, Any] = torch.load(start.checkpoint, weights_only=True)
    return content


def assert_same(one: Any, two: Any, where: str = "") -> None:
    """The same bits, however deep."""
    assert type(one) is type(two), where
    if isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key in one:
            assert_same(one[key], two[key], f"{where}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two), where
        for number, pair in enumerate(zip(one, two, strict=True)):
            assert_same(*pair, f"{where}/{number}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, two), where
    else:
        assert one == two, where


def curves(folder: Path) -> dict[str, list[tuple[int, str]]]:
    """Every point that TensorBoard shows, but how fast it was."""
    log = EventAccumulator(str(folder), {"tensors": 0})
    log.Reload()
    names = {name for plugin in log.ActivePlugins() for name in log.PluginTagToContent(plugin)}
    return {
        name: [(event.step, str(make_ndarray(event.tensor_proto).tolist())) for event in log.Tensors(name)]
        for name in names - {"train/tokens_per_second"}
    }


each = pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in NAMES])


@each
def test_a_run_that_was_killed_ends_as_if_it_had_not_been(name: str, runs: Path) -> None:
    """Weights, optimizer, schedule, running statistics, the open window, loops, and the states of callbacks."""
    whole, killed = (latest(runs / f"{name}-{kind}") for kind in ("whole", "killed"))
    assert whole["global_step"] == killed["global_step"] == STEPS
    for content in (whole, killed):
        for key in [key for key in content["callbacks"] if key.startswith("Checkpoint")]:
            del content["callbacks"][key]  # paths
        for times in content["loops"]["fit_loop"]["epoch_progress"].values():
            del times["ready"], times["started"]  # an epoch that is resumed at its end is not begun again
    assert whole["optimizer_states"][0]["state"]
    assert_same(killed, whole)


@each
def test_each_step_has_the_data_and_the_noise_that_it_would_have_had(name: str, runs: Path) -> None:
    """Also those that were taken twice, before the kill and after it."""
    found: dict[str, dict[int, set[str]]] = {}
    for kind in ("whole", "killed"):
        found[kind] = defaultdict(set)
        for line in (runs / f"{name}-{kind}.jsonl").read_text().splitlines():
            found[kind][json.loads(line)["step"]].add(line)
    assert sorted(found["whole"]) == list(range(1, STEPS + 1))
    assert found["killed"] == found["whole"]
    dice = [json.loads(line)["dice"][1:] for lines in found["whole"].values() for line in lines]
    assert len({number for three in dice for number in three}) == 3 * STEPS


@each
def test_the_curves_have_each_point_once(name: str, runs: Path) -> None:
    whole, killed = (curves(runs / f"{name}-{kind}") for kind in ("whole", "killed"))
    assert [step for step, _ in whole["train/loss"]] == list(range(STEPS))
    assert [step for step, _ in whole["val/loss" if "val/loss" in whole else "val/reward"]] == [3, 7]
    rates = {value for _, value in whole["lr-Adam" if "lr-Adam" in whole else "lr-AdamW"]}
    assert len(rates) == (math.ceil(STEPS / 2) if name == "EGPO" else STEPS)  # a trial has the rate of its step
    assert killed == whole


@each
def test_nothing_half_written_is_left(name: str, runs: Path) -> None:
    (path,) = (runs / f"{name}-whole" / "checkpoints").iterdir()
    left = {path.name for path in (runs / f"{name}-killed" / "checkpoints").iterdir()}
    assert path.name in left
    assert all(name.endswith(".ckpt") for name in left)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
