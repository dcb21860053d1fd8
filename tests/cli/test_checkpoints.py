"""What lies on the disk: as large as what was trained, whole or not there at all, and checked when it is read."""

import csv
import random
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from transformers import GPT2Config, GPT2LMHeadModel

from grade_lightning.callbacks import AtomicCheckpointIO, Checkpoint
from grade_lightning.errors import InputError
from grade_lightning.methods import RLOO, GradeSTE
from grade_lightning.policies import LoRA, Policy
from grade_lightning.rollouts import Sampler
from tests.cli.conftest import Run, Shelf, version
from tests.conftest import VOCABULARY, make_tokenizer
from tests.methods.toy_task import Toy, batches, make, trainer

resume = import_module("grade_lightning_cli.resume")  # its name once it is installed

# ---- size -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [GradeSTE, RLOO])
@pytest.mark.parametrize("lora", [None, LoRA(r=128, dropout=0.0)], ids=["full", "lora"])
def test_a_checkpoint_is_as_large_as_what_was_trained(method: Any, lora: LoRA | None, tmp_path: Path) -> None:
    """Weights and two moments of Adam, within 5 %: neither the reference, nor the reward, nor a window."""
    config = GPT2Config(n_embd=256, n_head=2, n_layer=3, n_positions=64, vocab_size=VOCABULARY, bos_token_id=0)
    config.eos_token_id, config.pad_token_id = 0, 1
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    policy = Policy.from_model(GPT2LMHeadModel(config), make_tokenizer(), lora)
    module = method(policy=policy, reward=Toy(), sampler=Sampler(max_new_tokens=6))
    run = trainer(max_steps=1)
    run.fit(module, batches(1))
    run.save_checkpoint(tmp_path / "a.ckpt")
    trained = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
    assert trained > 1_000_000
    assert (tmp_path / "a.ckpt").stat().st_size == pytest.approx(3 * trained, rel=0.05)


# ---- writing --------------------------------------------------------------------------------------------------


@contextmanager
def small_disk(room: int) -> Iterator[None]:
    """No file may become larger than this."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


STATE = {f"w{i}": torch.full((100, 100), float(i)) for i in range(10)}
CONTENT = {"state_dict": STATE, "global_step": 1}
KILLED = """
import os, signal, sys
import torch
from grade_lightning.callbacks import Checkpoint, AtomicCheckpointIO

class Half:
    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.file.write(data)

    def flush(self):
        self.file.flush()

save = torch.save
for room in range(0, 500_000, 50_000):
    if os.fork() == 0:
        torch.save = lambda what, file: save(what, Half(file, room))
        AtomicCheckpointIO().save_checkpoint({"w": torch.ones(100_000)}, sys.argv[1])
        os._exit(0)
    status = os.wait()[1]
    print("killed" if os.WIFSIGNALED(status) else "whole", float(torch.load(sys.argv[1])["w"][0]))
"""


@pytest.mark.slow
def test_a_kill_leaves_the_earlier_file(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    AtomicCheckpointIO().save_checkpoint({"w": torch.zeros(100_000)}, path)
    command = [sys.executable, "-c", KILLED, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = done.stdout.splitlines()
    assert len(found) == 10
    assert found[:8] == ["killed 0.0"] * 8
    assert found[-1] == "whole 1.0"
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]  # what was left half has been written over


@pytest.mark.parametrize("room", [0, 1_000, 200_000, 400_000])
def test_a_full_disk_leaves_the_earlier_file(room: int, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    AtomicCheckpointIO().save_checkpoint({"old": torch.ones(3)}, path)
    with (
        small_disk(room),
        pytest.raises(InputError, match=r"a.ckpt: the checkpoint cannot be written \(File too large"),
    ):
        AtomicCheckpointIO().save_checkpoint(CONTENT, path)
    assert torch.load(path)["old"].sum() == 3
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]
    AtomicCheckpointIO().save_checkpoint(CONTENT, path)
    assert torch.load(path)["global_step"] == 1


def test_what_cannot_be_saved_is_no_full_disk(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="pickle"):
        AtomicCheckpointIO().save_checkpoint({"f": lambda: None}, tmp_path / "a.ckpt")
    assert not (tmp_path / "a.ckpt").exists()


def test_a_run_on_a_full_disk_ends_in_one_line(
    run: Run, shelf: Shelf, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint before is there, and the run goes on from it."""
    save, calls = AtomicCheckpointIO.save_checkpoint, list[Any]()

    def second(self: AtomicCheckpointIO, *args: Any, **kwargs: Any) -> None:
        calls.append(args)
        with small_disk(20_000 if len(calls) == 2 else resource.RLIM_INFINITY):
            save(self, *args, **kwargs)

    args = [*shelf.all, "--trainer.max_steps=3", "--checkpoint.every_n_train_steps=1"]
    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", second)
    with pytest.raises(SystemExit) as exit:
        run("fit", *args)
    assert exit.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert line.startswith("grade-fit: error: ")
    assert "step=2.ckpt: the checkpoint cannot be written (File too large)" in line
    assert [path.name for path in version().glob("checkpoints/*")] == ["epoch=0-step=1.ckpt"]
    run("fit", *args, "--ckpt_path=last")
    assert (version() / "checkpoints" / "epoch=0-step=3.ckpt").is_file()


def test_the_last_good_one_is_removed_only_when_the_new_one_is_whole(
    run: Run, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, seen = AtomicCheckpointIO.save_checkpoint, list[set[str]]()

    def look(self: AtomicCheckpointIO, *args: Any, **kwargs: Any) -> None:
        seen.append({path.name for path in version().glob("checkpoints/*")})
        save(self, *args, **kwargs)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", look)
    run("fit", *shelf.all, "--trainer.max_steps=3", "--checkpoint.every_n_train_steps=1")
    assert seen == [set(), {"epoch=0-step=1.ckpt"}, {"epoch=0-step=2.ckpt"}]
    assert {path.name for path in version().glob("checkpoints/*")} == {"epoch=0-step=3.ckpt"}


class Late(Callback):
    """Logs by itself."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.loggers[0].log_metrics({"late": 1.0}, trainer.global_step)


def test_what_was_logged_is_on_the_disk_before_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger, found, save = CSVLogger(tmp_path), list[list[str]](), AtomicCheckpointIO.save_checkpoint

    def look(self: AtomicCheckpointIO, *args: Any, **kwargs: Any) -> None:
        rows = csv.DictReader(Path(logger.log_dir, "metrics.csv").read_text().splitlines())
        found.append([row["step"] for row in rows if row.get("late")])
        save(self, *args, **kwargs)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", look)
    callbacks = [Late(), Checkpoint(every_n_train_steps=2)]
    trainer(max_steps=5, logger=logger, enable_checkpointing=True, callbacks=callbacks).fit(make(GradeSTE), batches(5))
    assert found == [["1", "2"], ["1", "2", "3", "4"], ["1", "2", "3", "4", "5"]]


def test_a_monitor_that_is_not_logged(run: Run, shelf: Shelf, capsys: pytest.CaptureFixture[str]) -> None:
    """With a validation it is one line; without any the last step is saved all the same."""
    with pytest.raises(SystemExit) as exit:
        run("fit", *shelf.all, "--checkpoint.monitor=val/rewrad", "--trainer.val_check_interval=1")
    assert exit.value.code == 2
    assert "checkpoint.monitor = val/rewrad: nothing is logged by that name; there are val/" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="the last step is saved instead"):
        run("fit", *shelf.all, "--checkpoint.monitor=nope", "--trainer.limit_val_batches=0")
    assert [path.name for path in version(1).glob("checkpoints/*")] == ["epoch=0-step=2.ckpt"]


def test_the_last_step_of_a_run_in_epochs(run: Run, shelf: Shelf) -> None:
    run("fit", *shelf.all, "--trainer.max_steps=-1", "--trainer.max_epochs=1", "--trainer.val_check_interval=3")
    (path,) = version().glob("checkpoints/*")
    assert path.name == "epoch=1-step=4.ckpt"


# ---- reading --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "good.ckpt"
    AtomicCheckpointIO().save_checkpoint(CONTENT | {"pytorch-lightning_version": "2.6"}, path)
    return path.read_bytes()


def read(data: bytes | bytearray, folder: Path) -> dict[str, Any]:
    path = folder / "a.ckpt"
    path.write_bytes(data)
    resume.find_start(str(path), folder, "test", [])
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


def test_a_file_that_was_cut_off_is_damaged(good: bytes, tmp_path: Path) -> None:
    rng = random.Random(0)
    for size in [0, 1, len(good) - 1, *(rng.randrange(len(good)) for _ in range(100))]:
        with pytest.raises(InputError, match=r"a\.ckpt: cannot be read as a checkpoint.*damaged"):
            read(good[:size], tmp_path)


def test_a_byte_that_changed_is_noticed_or_means_nothing(good: bytes, tmp_path: Path) -> None:
    """Torch alone would read other weights; only padding between the parts of the file is under no checksum."""
    rng, noticed = random.Random(0), 0
    for _ in range(100):
        data = bytearray(good)
        data[rng.randrange(len(good))] ^= 1 << rng.randrange(8)
        try:
            found = read(data, tmp_path)
        except InputError:
            noticed += 1
        else:
            assert found["global_step"] == 1
            assert all(torch.equal(value, found["state_dict"][name]) for name, value in STATE.items())
    assert noticed > 90
