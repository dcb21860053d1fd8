"""What one types in Python: names, functions and lists are accepted where an object is meant."""

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from grade_lightning import (
    RLOO,
    TextDataModule,
)
from grade_lightning.callbacks import Checkpoint, Export, Progress
from grade_lightning.running import SETTINGS, make_trainer
from tests.conftest import make_model, make_tokenizer
from tests.methods.toy_task import trainer

pytestmark = pytest.mark.usefixtures("own_random_state")


def brevity(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [-float(len(text)) for text in completions]


@pytest.fixture
def folder(tmp_path: Path) -> str:
    make_model("llama").save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def prompts(count: int = 16) -> list[str]:
    return [f"w{2 + i % 17} w{2 + i // 4} w{3 + i % 5}" for i in range(count)]


def test_a_run_in_a_few_lines(folder: str, tmp_path: Path) -> None:
    """With Lightning's own Trainer and none of the command line's settings; then from its checkpoint."""
    data = TextDataModule(prompts=prompts(), batch_size=4, val_size=2, test_size=2)
    module = RLOO(policy=folder, reward=brevity, num_generations=2)
    run = Trainer(max_steps=2, default_root_dir=tmp_path, accelerator="cpu", enable_progress_bar=False)
    run.fit(module, datamodule=data)
    checkpoint = next(tmp_path.rglob("*.ckpt"))
    again = RLOO.load_from_checkpoint(checkpoint, policy=folder, reward=brevity, num_generations=2)
    state = module.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
    asked = ["w2 w3", "w4"]
    texts = []
    for found in (module, again):
        seed_everything(1)
        texts.append(found.generate(asked))
    assert texts[0] == texts[1]
    assert len(texts[0]) == 2
    (rows,) = trainer().predict(again, datamodule=data) or []
    assert len(rows) == 2
    assert {"prompt", "completion", "reward"} <= rows[0].keys()


def test_the_trainer_is_that_of_the_command_line(folder: str, tmp_path: Path) -> None:
    """Its callbacks and settings, but what only a command has."""
    args = ["--model", "RLOO", "--model.policy.path", folder, "--model.reward", "NumericMatch"]  # nothing bundled
    cli = import_module("grade_lightning_cli.config").build([*args, "--trainer.accelerator", "cpu"])
    ours = make_trainer(max_steps=300, accelerator="cpu", default_root_dir=tmp_path)
    theirs = {type(callback) for callback in cli.trainer.callbacks}
    found = {type(callback) for callback in ours.callbacks}  # type: ignore[attr-defined]
    assert found <= theirs
    assert {kind.__name__ for kind in theirs - found} == {"GradientVariance", "Summary", "_SaveConfig"}
    for name in (*SETTINGS, "precision"):
        assert getattr(ours, name, None) == getattr(cli.trainer, name, None)
    own = [ModelCheckpoint(), Export(folder="mine")]
    given = make_trainer(callbacks=own, enable_progress_bar=False, logger=False)
    kinds = [type(callback) for callback in given.callbacks]  # type: ignore[attr-defined]
    assert [kinds.count(kind) for kind in (ModelCheckpoint, Checkpoint, Export, Progress)] == [1, 0, 1, 0]


def test_the_page_runs(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/python.md, block after block, with a smaller model."""
    monkeypatch.chdir(tmp_path)
    page, names = (Path(__file__).parents[1] / "docs" / "python.md").read_text(), {"__name__": "page"}
    small = {
        '"gpt2"': repr(folder),
        "max_steps=20": "max_steps=2",
        "interval=10": "interval=2",
        "range(200)": "range(40)",
    }
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        for large, little in small.items():
            block = block.replace(large, little)
        exec(compile(block, "python.md", "exec"), names)
    assert (tmp_path / "aligned" / "model.safetensors").is_file()
