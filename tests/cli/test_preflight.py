"""What `grade-fit --preflight` says of a run, what it refuses, and how far off its estimate of the memory is."""

import doctest
import re
from collections.abc import Callable
from importlib import import_module
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch.profiler import ProfilerActivity, profile

import grade_lightning.methods
from grade_lightning.functional.vocabulary import ELEMENTS
from grade_lightning.module import AlignmentModule, TrainableModule
from tests.cli.conftest import Run, Shelf, assert_same, checkpoint, version
from tests.conftest import VOCABULARY

config, preflight = (import_module(f"grade_lightning_cli.{name}") for name in ("config", "preflight"))
METHODS = {
    name: value
    for name, value in vars(grade_lightning.methods).items()
    if isinstance(value, type) and issubclass(value, TrainableModule)
}
FULL = ["--data.max_prompt_tokens=8", "--data.max_text_tokens=8", "--model.sampler.min_new_tokens=6"]  # of both texts
Look = Callable[..., tuple[str, Any]]


def arguments(shelf: Shelf, method: str) -> list[str]:
    """A whole run of any method."""
    taken = ["--trainer", "--data"]
    if issubclass(METHODS[method], AlignmentModule):
        taken.append("--model.")
    elif method == "SupervisedFineTuning":
        taken.append("--model.policy")
    backbone = [f"--model.backbone={shelf.policy}"] if method == "RewardModel" else []
    given = (arg for arg in shelf.all if arg.startswith(tuple(taken)))
    return [f"--model={method}", *given, *backbone, "--data.batch_size=8"]


@pytest.fixture
def look(run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Look:
    """Run a preflight; give what it prints and what it measured. It may leave nothing."""
    found: list[Any] = []
    needs = preflight._needs

    def watched(memory: Any, *args: Any) -> Any:
        found.append(memory)
        return needs(memory, *args)

    monkeypatch.setattr(preflight, "_needs", watched)

    def look(*args: str) -> tuple[str, Any]:
        before = set(Path().rglob("*"))
        capsys.readouterr()
        run("fit", *args, "--preflight")
        assert set(Path().rglob("*")) == before
        return capsys.readouterr().out, found[-1]

    return look


@pytest.fixture
def refuse(run: Run, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a preflight that must end with one line and status 2; give the line. It may leave nothing."""

    def refuse(*args: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            run("fit", *args, "--preflight")
        assert exit.value.code == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("grade-fit: error: ")
        assert not Path("runs").exists()
        return line

    return refuse


def cell(table: str, row: str) -> str:
    """The cell beside this one."""
    return str(re.findall(rf"^│ {re.escape(row)} +│ +(.+?) +│", table, re.MULTILINE)[0])


# ---- what it says -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_method(method: str, look: Look, shelf: Shelf) -> None:
    out, memory = look(*arguments(shelf, method))
    assert cell(out, "method") == method
    assert cell(out, "device") == "cpu"
    assert cell(out, "precision") == "32-true; weights in float32"
    assert cell(out, "pad token") == "'<pad>' (1)"
    assert int(cell(out, "largest data.batch_size")) > 8
    sampled = issubclass(METHODS[method], AlignmentModule)
    assert len(re.findall(r"^│ w\d+ .* │$", out, re.MULTILINE)) == (2 if method in ("DPO", "IPO") else 4)
    assert ("a completion ends with │ '<eos>' (0)" in out) == sampled
    assert set(memory.phases) >= ({"sampling", "reward", "reference"} if sampled else {"loss", "backward"})
    assert memory.unit == {"DPO": 4, "IPO": 4, "GRPO": 8}.get(method, memory.unit)
    weights = {"policy", "reference", "reward"} if sampled else {"classifier" if method == "RewardModel" else "policy"}
    weights |= {"value head"} if method == "PPO" else set()
    assert set(memory.parts) == weights | {"gradients", "optimizer state"}


@pytest.mark.parametrize("lora", [[], ["--model.policy.lora.r=2"]], ids=["full", "lora"])
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
    preflight.preflight(cli.trainer, cli.model, cli.datamodule, None)
    assert_same(cli.model.state_dict(), before)


def test_any_optimizer(look: Look, shelf: Shelf) -> None:
    _, memory = look(*shelf.all, "--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.1")
    assert memory.parts["optimizer state"] == 0


def test_completions_are_really_sampled_and_scored(look: Look, shelf: Shelf, own: str) -> None:
    args = [arg for arg in arguments(shelf, "RLOO") if "reward" not in arg]
    out, _ = look(
        *args, "--model.reward=FunctionReward", f"--model.reward.function={own}.words", "--data.reward_size=0"
    )
    rows = re.findall(r"^│ (w[w\d ]+?) +│ ([w\d ]*?) +│ (\d)(, cut off)? +│ (\S+) +│$", out, re.MULTILINE)
    assert len(rows) == 4
    assert len({completion for _, completion, *_ in rows}) > 1
    for _, completion, tokens, cut, reward in rows:
        assert float(reward) == len(completion.split())
        assert (int(tokens) == 6) or not cut


def test_the_trained_policy_of_a_checkpoint(look: Look, run: Run, shelf: Shelf) -> None:
    constant = ["--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=5"]
    run("fit", *shelf.all, *constant, "--trainer.val_check_interval=2")
    start, _ = look(*shelf.all, "--trainer.max_steps=4")
    then, _ = look(*shelf.all, *constant, "--trainer.max_steps=4", f"--ckpt_path={checkpoint(version())}")
    assert start.partition("A batch")[2] != then.partition("A batch")[2]


# ---- its estimate -------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("method", ["GradeSTE", "Grade", "PPO", "SupervisedFineTuning"])
def test_the_estimate_of_a_larger_batch(method: str, look: Look, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """From two small batches to four times the larger, beside the profiler's count in a real run of such texts."""
    monkeypatch.setitem(ELEMENTS, "cpu", 12 * VOCABULARY)  # a tiny model fills a chunk, too
    full = [arg for arg in FULL if issubclass(METHODS[method], AlignmentModule) or "sampler" not in arg]
    args = [*arguments(shelf, method), *full, "--data.batch_size=32", "--data.prompt_size=32", "--data.reward_size=0"]
    _, memory = look(*args)
    cli = config.build([*args, "--trainer.max_steps=5", "--trainer.limit_val_batches=0"])
    watch = Watch(step=cli.model.visits)  # the first of the second window, or the second
    cli.trainer.callbacks = [watch]
    cli.trainer.logger = None
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    measured = watch.peak + sum(amount for part, amount in memory.parts.items() if part != "gradients")
    assert memory.total(32) == pytest.approx(measured, rel=0.01)


def test_what_is_alive_at_the_same_time() -> None:
    x = torch.ones(1000, requires_grad=True)
    with preflight.LiveTensors() as live:
        y = x.exp() * 2
        assert live.now == 4000 + 4000  # what exp has saved for its backward pass, and y
        view = y[:10].view(2, 5)
        view.detach().zero_()
        assert live.now == 8000
        y.sum().backward()
        assert live.now == 4000 + 4000 + 4000 - 4000  # y, x.grad and nothing that was saved
    del y, view
    assert live.now == 4000
    assert live.peaks["loss"] >= 12000


def test_the_functions_of_the_estimate() -> None:
    assert doctest.testmod(preflight).failed == 0


# ---- what it refuses ----------------------------------------------------------------------------------------------


def test_a_batch_that_does_not_fit(refuse: Any, look: Look, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "_room", lambda *_: 2_000_000)
    line = refuse(*shelf.all, "--data.batch_size=24", "--data.prompt_size=24")
    (largest,) = re.findall(r"data.batch_size: 24 needs about \S+ MB of memory.*; lower it to (\d+)$", line)
    _, memory = look(*shelf.all, f"--data.batch_size={largest}")
    assert memory.total(int(largest)) <= 0.9 * 2_000_000 < memory.total(int(largest) + 2)
    monkeypatch.setattr(preflight, "_room", lambda *_: 100_000)
    assert "take a smaller model" in refuse(*shelf.all)


def test_memory_that_is_used_up_on_the_way(refuse: Any, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(grade_lightning.methods.GradeSTE, "loss", fails)
    assert "out of memory with a batch_size of 1; take a smaller model" in refuse(*shelf.all)


def test_memory_that_is_not_known(look: Look, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "_room", lambda *_: None)
    out, _ = look(*shelf.all)
    assert cell(out, "there are") == "unknown"
    assert "largest" not in out.partition("in all")[2].partition("phases")[2]


@pytest.mark.parametrize(
    ("wrong", "part"),
    [
        ("--data.source.train=nowhere.csv", "nowhere.csv"),
        ("--data.prompt_size=1000", "lower"),
        ("--data.val_size=0", "data.val_size"),
        ("--data.batch_size=17", "split 'prompts' has 16 rows"),
        ("--model.reward.path=./nowhere", "./nowhere: no such folder"),
        ("--model.sampler.max_new_tokens=53", "context is 64"),
        ("--model.sampler.max_new_tokens=0", "sampler.max_new_tokens = 0: must be 1 or more"),
        ('--model.policy.lora={"r": 2, "target_modules": ["nothing"]}', "LoRA"),
        ("--ckpt_path=nowhere.ckpt", "no such checkpoint"),
        ("--trainer.max_steps=0", "ends before its first step"),
        ("--trainer.strategy=fsdp2", "under fsdp2 nothing is measured"),
    ],
)
def test_what_a_run_would_refuse(wrong: str, part: str, refuse: Any, shelf: Shelf) -> None:
    assert part in refuse(*shelf.all, wrong)


def test_an_export_is_looked_at_as_by_the_run(
    look: Look, run: Run, shelf: Shelf, capsys: pytest.CaptureFixture[str]
) -> None:
    look(*shelf.all, "--export.push_to_hub=me/x")
    run("fit", *shelf.all)
    with pytest.raises(SystemExit) as exit:
        run("fit", *shelf.all, "--ckpt_path=last", "--trainer.max_steps=9", "--preflight")
    assert exit.value.code == 2
    assert "export: exists and is not empty" in capsys.readouterr().err


def test_only_fit_has_it(run: Run, shelf: Shelf, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        run("test", *shelf.all, "--preflight")
    assert exit.value.code == 2
    assert "preflight" in capsys.readouterr().err


def test_a_gpu_has_what_is_free_and_what_it_holds_for_us(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30, 80))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 20)
    module: Any = SimpleNamespace(device=torch.device("cuda"))
    assert preflight._room(None, module) == 50
