"""What a preflight refuses."""

import re
from importlib import import_module
from typing import Any

import pytest
import torch

import grade_lightning.methods
from tests.cli.conftest import Run, Shelf
from tests.cli.preflight.conftest import Look

inventory = import_module("grade_lightning_cli.preflight.inventory")


@pytest.mark.slow
def test_a_batch_that_does_not_fit(refuse: Any, look: Look, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    args = [*shelf.all, "--data.batch_size=24", "--data.prompt_size=24"]
    _, memory = look(*args)
    room = memory.total(12)
    monkeypatch.setattr(inventory, "room", lambda *_: room / 0.9)
    line = refuse(*args)
    (largest,) = re.findall(r"data.batch_size: 24 needs about \S+ MB of memory.* or lower it to (\d+)$", line)
    _, memory = look(*shelf.all, f"--data.batch_size={largest}", "--data.prompt_size=24")
    assert memory.total(int(largest)) <= room < memory.total(int(largest) + 2)
    monkeypatch.setattr(inventory, "room", lambda *_: 100_000)
    assert "take a smaller model" in refuse(*shelf.all)


def test_memory_that_is_used_up_on_the_way(refuse: Any, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(grade_lightning.methods.GradeSTE, "loss", fails)
    assert "out of memory with a batch_size of 1; take a smaller model" in refuse(*shelf.all)


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


@pytest.mark.slow
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
