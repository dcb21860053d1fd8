"""Resuming a run from the command line: after a kill, by SLURM, with other processes."""

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.summary.writer import event_file_writer  # type: ignore[import-untyped]

from tests.cli.conftest import Run, Shelf, events, new_shell, scalar, version
from tests.conftest import mostly_slow
from tests.test_resume import assert_same, curves, latest

INTERRUPT = '''
import json, os, signal
import torch
from lightning.pytorch import Callback

class Interrupt(Callback):
    """Does what INTERRUPT says, such as `SIGUSR1@3,PowerCut@5`, within these steps; writes down what each one saw."""

    def on_train_start(self, trainer, pl_module):
        if "SAVE" in os.environ:
            trainer.save_checkpoint("start.ckpt")

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.state.fn == "validate":
            self.strike(100 + trainer.global_step)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.strike(trainer.global_step + 1)

    def strike(self, now):
        for what in filter(None, os.environ.get("INTERRUPT", "").split(",")):
            name, step = what.split("@")
            if now == int(step):
                if name == "PowerCut":
                    raise OSError("power cut")
                os.kill(os.getpid(), getattr(signal, name))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        rollout = pl_module.last_rollout[0].ids.tolist() if hasattr(pl_module, "last_rollout") else None
        seen = [trainer.global_step, batch["input_ids"].tolist(), rollout, torch.initial_seed()]
        os.makedirs(trainer.default_root_dir, exist_ok=True)
        with open(os.path.join(trainer.default_root_dir, f"rank{trainer.global_rank}.jsonl"), "a") as file:
            print(json.dumps(seen), file=file)
'''
SIX = [
    "--trainer.callbacks=interrupt.Interrupt",
    "--checkpoint.every_n_train_steps=2",
    "--trainer.max_steps=6",
    "--trainer.val_check_interval=3",
    "--trainer.log_every_n_steps=1",
    "--completions.every_n_steps=1",
]
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NAME": "train",
    "SLURM_NTASKS": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}


@pytest.fixture(autouse=True)
def interrupt(shell: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A callback of the user's that interrupts runs."""
    (tmp_path / "interrupt.py").write_text(INTERRUPT)
    shell.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("interrupt", None)


@pytest.fixture(scope="module")
def whole(shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of six steps that nothing interrupted."""
    from tests.cli.conftest import enter

    root = tmp_path_factory.mktemp("whole")
    (root / "interrupt.py").write_text(INTERRUPT)
    with new_shell(root, tmp_path_factory.getbasetemp() / "datasets") as patch:
        patch.syspath_prepend(root)
        enter(patch, "fit", *shelf.all, *SIX)
    sys.modules.pop("interrupt", None)
    return root / version()


Cut = Callable[..., None]


@pytest.fixture
def cut(run: Run, shell: pytest.MonkeyPatch) -> Cut:
    """Run a command that does not come to its end: `cut("PowerCut@5", "--model=…", …)`."""
    # files of one second and one process are told apart by a number, and read as 10, 9
    shell.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(100))

    def cut(what: str, *args: str) -> None:
        shell.setenv("INTERRUPT", what)
        with pytest.raises(OSError, match="power cut"):
            run("fit", *args)
        shell.delenv("INTERRUPT")

    return cut


def content(folder: Path) -> dict[str, Any]:
    """The latest checkpoint of a run, but for what differs: the paths."""
    found = latest(folder)
    for key in [key for key in found["callbacks"] if key.startswith("Checkpoint")]:
        del found["callbacks"][key]
    for times in found["loops"]["fit_loop"]["epoch_progress"].values():
        del times["ready"], times["started"]
    del found["loops"]["validate_loop"]  # the measurement before the start
    return found


def assert_is(folder: Path, whole: Path) -> None:
    """The run is the other, and its curves have each point once."""
    assert_same(content(folder), content(whole))
    assert [event.step for event in events(folder).Scalars("train/loss")] == list(range(6))
    assert curves(folder) == curves(whole)


# ---- --ckpt_path ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", mostly_slow(["last", "runs/GradeSTE/version_0"], "last"))
def test_a_run_goes_on_in_its_folder(
    where: str, cut: Cut, run: Run, shelf: Shelf, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two steps after its checkpoint it was cut off: those are taken again, and shown once."""
    cut("PowerCut@4", *shelf.all, *SIX)
    first = (version() / "config.yaml").read_text()
    before = {path.name for path in version().iterdir()}
    run("fit", *shelf.all, *SIX, f"--ckpt_path={where}")
    assert "The run in runs/GradeSTE/version_0 resumes at step 2" in capsys.readouterr().err
    assert [path.name for path in version().parent.iterdir()] == ["version_0"]
    assert_is(version(), whole)
    assert (version() / "config.yaml").read_text() == first
    assert f"ckpt_path: {where}" in (version() / "config-2.yaml").read_text()
    assert before < {path.name for path in version().iterdir()}


@pytest.mark.slow
def test_the_saved_configuration_goes_on_too(cut: Cut, run: Run, shelf: Shelf, whole: Path) -> None:
    cut("PowerCut@4", *shelf.all, *SIX)
    run("fit", f"--config={version() / 'config.yaml'}", "--ckpt_path=last")
    assert_is(version(), whole)


def test_a_file_begins_a_run_of_its_own(run: Run, shelf: Shelf, whole: Path) -> None:
    (start,) = (whole / "checkpoints").glob("*.ckpt")
    before = curves(whole)
    run("fit", *shelf.all, *SIX, "--trainer.max_steps=8", f"--ckpt_path={start}")
    assert [event.step for event in events(version()).Scalars("train/loss")] == [6, 7]
    assert curves(whole) == before


@pytest.mark.slow
def test_last_is_the_run_that_was_last(cut: Cut, run: Run, shelf: Shelf) -> None:
    for number in range(2):
        cut("PowerCut@4", *shelf.all, *SIX)
        assert version(number).is_dir()
    os.utime(next(version(0).glob("checkpoints/*.ckpt")))  # it was written last
    run("fit", *shelf.all, *SIX, "--ckpt_path=last")
    assert len(scalar(version(0), "train/loss")) == 6
    assert len(scalar(version(1), "train/loss")) == 3


def test_last_is_of_the_method(run: Run, shelf: Shelf, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where there is none, training begins; a measurement does not."""
    root = f"--trainer.default_root_dir={whole.parent.parent}"
    sft = ["--model=SupervisedFineTuning", f"--model.policy.path={shelf.policy}", *shelf.data]
    with pytest.raises(SystemExit):
        run("test", *sft, "--trainer.accelerator=cpu", root, "--ckpt_path=last")
    assert "--ckpt_path last: there is no checkpoint in" in capsys.readouterr().err
    run("fit", *shelf.all, *SIX, "--trainer.max_steps=1", "--ckpt_path=last")
    assert "this run begins at the beginning" in capsys.readouterr().err
    assert len(scalar(version(), "train/loss")) == 1


def test_last_is_of_our_logger(run: Run, shelf: Shelf, capsys: pytest.CaptureFixture[str]) -> None:
    for elsewhere in ("--trainer.logger=false", "--checkpoint.dirpath=mine"):
        with pytest.raises(SystemExit) as exit:
            run("fit", *shelf.all, elsewhere, "--ckpt_path=last")
        assert exit.value.code == 2
        assert "checkpoints are elsewhere; give the path of a .ckpt file" in capsys.readouterr().err


def test_a_run_of_another_method_is_not_touched(
    run: Run, shelf: Shelf, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    with pytest.raises(SystemExit) as exit:
        run("fit", *shelf.all, "--model=Reinforce", f"--ckpt_path={whole}")
    assert exit.value.code == 2
    assert "it is of GradeSTE, but --model is Reinforce" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in whole.rglob("*")}


def test_a_resume_that_fails_leaves_no_trace(
    run: Run, shelf: Shelf, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With other LoRA settings the checkpoint is refused, after logger and configuration were set up."""
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as exit:
        run("fit", *shelf.all, *SIX, "--trainer.max_steps=8", "--model.policy.lora.r=2", f"--ckpt_path={whole}")
    assert exit.value.code == 2
    assert "its weights do not fit this model" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_the_epoch_at_the_end_is_the_one_that_was_reached(run: Run, shelf: Shelf) -> None:
    """Of four steps an epoch: whole epochs are counted, in a run, in its resume, and where nothing is left to train."""

    def last() -> tuple[int, float]:
        return [(event.step, event.value) for event in events(version()).Scalars("epoch")][-1]

    run("fit", *shelf.all, *SIX, "--trainer.max_steps=4")
    assert last() == (4, 1)
    run("fit", *shelf.all, *SIX, "--trainer.max_steps=4", "--ckpt_path=last")
    assert last() == (4, 1)
    for steps in (5, 7):
        run("fit", *shelf.all, *SIX, f"--trainer.max_steps={steps}", "--ckpt_path=last", f"--export.folder={steps}")
        assert last() == (steps, 1)


@pytest.mark.slow
def test_other_batches_resume_at_the_next_row(
    cut: Cut, run: Run, shelf: Shelf, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of sixteen prompts eight are behind the checkpoint: the next step has the other eight, and one line says so."""
    run("fit", *shelf.all, *SIX, "--trainer.max_steps=4", "--trainer.default_root_dir=plain")
    cut("PowerCut@4", *shelf.all, *SIX)
    with pytest.warns(UserWarning, match="of 4 of 16 rows a batch, .* this run is of 8 of 16 rows a batch"):
        run("fit", *shelf.all, *SIX, "--trainer.max_steps=3", "--data.batch_size=8", "--ckpt_path=last")
    before, after, plain = (
        {step: rows for step, rows, *_ in map(json.loads, (folder / "rank0.jsonl").read_text().splitlines())}
        for folder in (Path(), version(), Path("plain"))
    )
    assert list(after) == [3]
    epoch = [*before[1], *before[2], *after[3]]
    assert len(epoch) == 16
    assert sorted(epoch) == sorted(row for rows in plain.values() for row in rows)


def test_an_empty_folder_is_named(run: Run, shelf: Shelf, capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    with pytest.raises(SystemExit):
        run("fit", *shelf.all, "--ckpt_path=empty")
    assert "error: empty: holds no checkpoint of a run" in capsys.readouterr().err


@pytest.mark.slow
def test_a_measurement_of_last_has_a_log_of_its_own(cut: Cut, run: Run, shelf: Shelf) -> None:
    cut("PowerCut@4", *shelf.all, *SIX)
    before = curves(version())
    run("test", *shelf.all, "--ckpt_path=last")
    assert curves(version()) == before
    assert scalar(version(1), "test/kl")[0] > 0


@pytest.mark.slow
def test_a_complete_run_stays_as_it_is(run: Run, shelf: Shelf, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever wants more of it names another place for the model."""
    run("fit", *shelf.all, *SIX, "--trainer.max_steps=4")
    model = version() / "export" / "model.safetensors"
    written, shown = model.stat().st_mtime_ns, scalar(version(), "train/loss")
    run("fit", *shelf.all, *SIX, "--trainer.max_steps=4", "--ckpt_path=last")
    assert model.stat().st_mtime_ns == written
    assert scalar(version(), "train/loss") == shown
    with pytest.raises(SystemExit):
        run("fit", *shelf.all, *SIX, "--ckpt_path=last")
    assert "export: exists and is not empty; give --export.folder another name" in capsys.readouterr().err
    run("fit", *shelf.all, *SIX, "--ckpt_path=last", "--export.folder=more")
    assert model.stat().st_mtime_ns == written
    assert Path("more", "model.safetensors").is_file()
    assert [event.step for event in events(version()).Scalars("train/loss")] == list(range(6))


def test_flags_of_the_checkpoint(run: Run, shelf: Shelf) -> None:
    keep = ["--checkpoint.save_top_k=-1", "--checkpoint.save_last=true", "--checkpoint.filename={step}"]
    run("fit", *shelf.all, *SIX, *keep)
    found = {path.name for path in version().glob("checkpoints/*")}
    assert found == {"step=2.ckpt", "step=4.ckpt", "step=6.ckpt", "last.ckpt"}


@pytest.mark.slow
def test_no_checkpoint_between_the_micro_batches_of_a_step(cut: Cut, run: Run, shelf: Shelf) -> None:
    """A validation after three of four micro-batches: the checkpoint waits for the fourth."""
    args = [*shelf.all, *SIX, "--trainer.accumulate_grad_batches=2", "--checkpoint.every_n_train_steps=null"]
    run("fit", *args)
    cut("PowerCut@3", *args)
    assert latest(version(1))["global_step"] == 2
    run("fit", *args, "--ckpt_path=last")
    assert_is(version(1), version(0))


# ---- SLURM ----------------------------------------------------------------------------------------------------


@pytest.fixture
def slurm(shell: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A job, and a `scontrol` that writes down what it is asked for."""
    for name, value in SLURM.items():
        shell.setenv(name, value)
    program = tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/requeued\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    shell.setenv("PATH", str(program.parent), prepend=os.pathsep)
    return shell


def job(number: int = 4711) -> list[Path]:
    return sorted(Path("runs/GradeSTE").glob(f"job_{number}_*"))


@pytest.mark.slow
def test_a_job_that_is_requeued_goes_on(
    slurm: pytest.MonkeyPatch, cut: Cut, run: Run, shelf: Shelf, whole: Path
) -> None:
    """SLURM's signal comes in the middle of the third step, the end of the job in the fifth; the command is the same.

    A new job that does the same begins at the beginning.
    """
    before = signal.getsignal(signal.SIGUSR1)
    cut("SIGUSR1@3,PowerCut@5", *shelf.all, *SIX, "--checkpoint.every_n_train_steps=100")
    (folder,) = job()
    assert Path("requeued").read_text() == "requeue 4711\n"
    saved = torch.load(folder / "checkpoints" / "requeue.ckpt", weights_only=True)
    assert saved["global_step"] == 3
    slurm.setenv("SLURM_RESTART_COUNT", "1")
    run("fit", *shelf.all, *SIX, "--checkpoint.every_n_train_steps=100")
    assert job() == [folder]
    assert [event.step for event in events(folder).Scalars("train/loss")] == list(range(6))
    assert_same(content(folder)["state_dict"], content(whole)["state_dict"])
    assert_same(content(folder)["optimizer_states"], content(whole)["optimizer_states"])
    assert curves(folder) == curves(whole)
    slurm.setenv("SLURM_JOB_ID", "4712")
    run("fit", *shelf.all, *SIX, "--checkpoint.every_n_train_steps=100", "--trainer.limit_val_batches=0")
    assert len(scalar(job(4712)[0], "train/loss")) == 6
    assert signal.getsignal(signal.SIGUSR1) == before


@pytest.mark.slow
@pytest.mark.parametrize(("when", "complete"), [("SIGUSR1@100,PowerCut@1", False), ("SIGUSR1@103", True)])
def test_a_job_that_is_requeued_while_it_measures(
    when: str, complete: bool, slurm: pytest.MonkeyPatch, cut: Cut, run: Run, shelf: Shelf, whole: Path
) -> None:
    """Before the training and after it: there is nothing to save, and Lightning leaves nothing that it would load."""
    if complete:
        slurm.setenv("INTERRUPT", when)
        run("fit", *shelf.all, *SIX, "--trainer.max_steps=3", "--trainer.val_check_interval=2")
        slurm.delenv("INTERRUPT")
    else:
        cut(when, *shelf.all, *SIX)
    assert Path("requeued").read_text() == "requeue 4711\n"
    assert not list(Path().rglob("hpc_ckpt*"))
    assert not list(Path().rglob("requeue.ckpt"))
    slurm.setenv("SLURM_RESTART_COUNT", "1")
    if complete:
        run("fit", *shelf.all, *SIX, "--trainer.max_steps=3", "--trainer.val_check_interval=2")
        assert [event.step for event in events(job()[0]).Scalars("val/reward")] == [0, 1, 3]
    else:
        run("fit", *shelf.all, *SIX)
        assert_is(job()[0], whole)


@pytest.mark.slow
def test_a_job_whose_logs_are_elsewhere_goes_on(
    slurm: pytest.MonkeyPatch, cut: Cut, run: Run, shelf: Shelf, whole: Path
) -> None:
    logger = ["--trainer.logger=lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir=logs"]
    cut("PowerCut@4", *shelf.all, *SIX, *logger)
    slurm.setenv("SLURM_RESTART_COUNT", "1")
    run("fit", *shelf.all, *SIX, *logger)
    assert_same(content(job()[0])["state_dict"], content(whole)["state_dict"])
    assert_same(content(job()[0])["optimizer_states"], content(whole)["optimizer_states"])


def test_a_job_that_cannot_ask_for_another_is_saved_and_ends(
    slurm: pytest.MonkeyPatch, tmp_path: Path, run: Run, shelf: Shelf
) -> None:
    """As in a container without SLURM's programs."""
    (tmp_path / "bin" / "scontrol").write_text("#!/bin/sh\nexit 1\n")
    slurm.setenv("INTERRUPT", "SIGUSR1@3")
    with pytest.warns(UserWarning, match="SLURM could not be asked to start it again"):
        run("fit", *shelf.all, *SIX)
    slurm.delenv("INTERRUPT")
    assert {path.name for path in job()[0].glob("checkpoints/*")} == {"requeue.ckpt", "epoch=1-step=6.ckpt"}


def test_a_task_of_an_array_is_requeued_alone(slurm: pytest.MonkeyPatch, cut: Cut, shelf: Shelf) -> None:
    slurm.setenv("SLURM_ARRAY_JOB_ID", "4700")
    slurm.setenv("SLURM_ARRAY_TASK_ID", "3")
    cut("SIGUSR1@1,PowerCut@2", *shelf.all, *SIX)
    assert Path("requeued").read_text() == "requeue 4700_3\n"


def test_a_job_whose_machine_failed_goes_on(
    slurm: pytest.MonkeyPatch, cut: Cut, run: Run, shelf: Shelf, whole: Path
) -> None:
    """SLURM starts it again without having said a word."""
    cut("PowerCut@1", *shelf.all, *SIX)  # before there was any checkpoint
    slurm.setenv("SLURM_RESTART_COUNT", "1")
    cut("PowerCut@5", *shelf.all, *SIX)
    slurm.setenv("SLURM_RESTART_COUNT", "2")
    run("fit", *shelf.all, *SIX)
    (folder,) = job()
    assert_is(folder, whole)
    assert {path.name for path in folder.glob("config*")} == {"config.yaml", "config-2.yaml", "config-3.yaml"}


@pytest.mark.slow
def test_other_commands_and_jobs_have_folders_of_their_own(slurm: pytest.MonkeyPatch, run: Run, shelf: Shelf) -> None:
    short = ["--trainer.max_steps=1", "--trainer.limit_val_batches=0", "--export.enabled=false"]
    for seed in (1, 2, 2):  # the third does what the second did: it was not restarted
        run("fit", *shelf.all, *short, f"--seed_everything={seed}")
    assert len(job()) == 3
    for folder in job():
        assert len(list(folder.glob("config*.yaml"))) == len(list(folder.glob("checkpoints/*.ckpt"))) == 1
    slurm.setenv("SLURM_RESTART_COUNT", "1")
    run("fit", *shelf.all, *short, "--seed_everything=3")  # had not begun when the job was ended
    assert len(job()) == 4


# ---- real kills, several processes ----------------------------------------------------------------------------


def begin(folder: Path, *args: str, **environment: str) -> subprocess.Popen[str]:
    """Start `grade-fit` as a process."""
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    more = {"PYTHONPATH": path, "HF_DATASETS_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "grade_lightning_cli", *args],
        cwd=folder,
        env=os.environ | more | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], status: int = 0) -> str:
    """Wait for the end of a process, and look at how it ended.

    Returns:
        Its messages.
    """
    _, messages = process.communicate(timeout=300)
    assert process.returncode == status, messages
    return messages


def without_model(shelf: Shelf) -> list[str]:
    return [arg for arg in shelf.all if not arg.startswith("--model=")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "how", "status"),
    [
        ("GradeSTE", "SIGKILL@4", -signal.SIGKILL),
        ("PPO", "SIGKILL@4", -signal.SIGKILL),
        ("RewardModel", "SIGKILL@4", -signal.SIGKILL),
        ("PPO", "SIGTERM@5", 128 + signal.SIGTERM),  # at the end of this step, which is not saved
    ],
)
def test_a_process_that_was_killed_goes_on(model: str, how: str, status: int, shelf: Shelf, tmp_path: Path) -> None:
    args = [f"--model={model}", *without_model(shelf), *SIX]
    if model == "RewardModel":
        args = [arg for arg in args if not arg.startswith("--model.")] + [f"--model.backbone={shelf.policy}"]
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "interrupt.py").write_text(INTERRUPT)
    finish(begin(tmp_path / "whole", *args))
    finish(begin(tmp_path / "killed", *args, INTERRUPT=how), status)
    finish(begin(tmp_path / "killed", *args, "--ckpt_path=last"))
    assert_is(tmp_path / "killed" / version(method=model), tmp_path / "whole" / version(method=model))


PAIR = ["--trainer.devices=2", "--trainer.strategy=ddp"]


def pair_args(shelf: Shelf) -> list[str]:
    """Windows of two steps and a checkpoint in the middle of the second, which has a β of its own."""
    ppo = ["--model=PPO", "--model.epochs=2", "--model.kl.beta=0.1", "--model.kl.target=0.1", "--model.kl.horizon=32"]
    more = ["--checkpoint.every_n_train_steps=3", "--data.batch_size=2", "--trainer.default_root_dir=runs"]
    return [*ppo, *without_model(shelf), *SIX, *more]


def folder_for(root: Path, name: str) -> Path:
    folder = root / name
    (folder / "runs").mkdir(parents=True)
    (folder / "interrupt.py").write_text(INTERRUPT)
    return folder


def seen(folder: Path, rank: int) -> set[str]:
    return {line for path in folder.rglob(f"rank{rank}.jsonl") for line in path.read_text().splitlines()}


@pytest.fixture(scope="module")
def pair(shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes that nothing interrupted."""
    folder = folder_for(tmp_path_factory.mktemp("pair"), "whole")
    finish(begin(folder, *pair_args(shelf), *PAIR))
    assert seen(folder, 0).isdisjoint(seen(folder, 1))
    return folder


@pytest.mark.slow
def test_two_processes_go_on_and_one_goes_on_from_two(pair: Path, shelf: Shelf, tmp_path: Path) -> None:
    """One has the state of both, but rows and noise of its own."""
    args, name = pair_args(shelf), version(method="PPO")
    folder = folder_for(tmp_path, "killed")
    finish(begin(folder, *args, *PAIR, INTERRUPT="SIGKILL@5"), -signal.SIGKILL)
    shutil.copytree(folder, tmp_path / "alone")
    before = latest(folder / name)
    assert before["global_step"] == 3
    assert before["grade_lightning"]["parts"]["kl"]["beta"] != 0.1
    assert len(before["grade_lightning"]["windows"]) == 2

    finish(begin(folder, *args, *PAIR, "--ckpt_path=last"))
    assert_is(folder / name, pair / name)
    for rank in range(2):
        assert len(seen(pair, rank)) == 6
        assert seen(folder, rank) == seen(pair, rank)

    messages = finish(begin(tmp_path / "alone", *args, "--ckpt_path=last", SAVE="yes"))
    assert "it is of 2 processes and this run has 1. Weights, optimizer, schedule and" in messages
    after = torch.load(tmp_path / "alone" / "start.ckpt", weights_only=True)
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch"):
        assert_same(after[key], before[key])
    assert after["grade_lightning"]["parts"] == before["grade_lightning"]["parts"]
    steps = [event.step for event in events(tmp_path / "alone" / name).Scalars("train/loss")]
    assert steps == list(range(6))


@pytest.mark.slow
def test_two_processes_end_together_by_sigterm(pair: Path, shelf: Shelf, tmp_path: Path) -> None:
    """Each is sent it by itself, as all processes of a terminal are, wherever it is then."""
    args, folder, name = pair_args(shelf), folder_for(tmp_path, "ended"), version(method="PPO")
    process = begin(folder, *args, *PAIR, INTERRUPT="SIGTERM@5")
    _, messages = process.communicate(timeout=300)
    # Lightning kills the first if it still sees the end of the second
    assert process.returncode in (128 + signal.SIGTERM, -signal.SIGKILL), messages
    assert latest(folder / name)["global_step"] == 3
    finish(begin(folder, *args, *PAIR, "--ckpt_path=last"))
    assert_is(folder / name, pair / name)


@pytest.mark.slow
def test_two_tasks_of_a_job_are_requeued_together(
    pair: Path, slurm: pytest.MonkeyPatch, shelf: Shelf, tmp_path: Path
) -> None:
    """SLURM's signal reaches one of them in the second step, and the other in the third."""
    args, folder = [*pair_args(shelf), *PAIR, "--checkpoint.every_n_train_steps=100"], folder_for(tmp_path, "job")
    slurm.setenv("SLURM_NTASKS", "2")
    slurm.setenv("SLURM_NTASKS_PER_NODE", "2")
    slurm.setenv("MASTER_ADDR", "127.0.0.1")

    def both(status: int, *interrupts: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            slurm.setenv("MASTER_PORT", str(free.getsockname()[1]))
        tasks = [
            begin(folder, *args, INTERRUPT=interrupt, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank))
            for rank, interrupt in enumerate(interrupts)
        ]
        for task in tasks:
            finish(task, status)

    both(-signal.SIGKILL, "SIGUSR1@3,SIGKILL@5", "SIGUSR1@2,SIGKILL@5")
    assert Path("requeued").read_text() == "requeue 4711\n"
    slurm.setenv("SLURM_RESTART_COUNT", "1")
    both(0, "", "")
    (run_folder,) = (folder / "runs" / "PPO").iterdir()
    assert torch.load(run_folder / "checkpoints" / "requeue.ckpt", weights_only=True)["global_step"] == 2
    name = version(method="PPO")
    assert_same(content(run_folder)["state_dict"], content(pair / name)["state_dict"])
    assert_same(content(run_folder)["optimizer_states"], content(pair / name)["optimizer_states"])
    assert curves(run_folder) == curves(pair / name)
    for rank in range(2):
        assert seen(folder, rank) == seen(pair, rank)
