"""Two processes: the same weights, other prompts, other noise."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Shelf, checkpoint, scalar, version

WATCHED = '''
import hashlib, json, os
import torch
from grade_lightning.methods import GradeSTE

class Watched(GradeSTE):
    """Writes down what each process saw."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        rollout = self.last_rollout[0]
        seen = self.__dict__.setdefault("seen", [])
        seen.append({"prompts": rollout.prompts, "seed": torch.initial_seed()})
        return loss

    def on_train_end(self):
        digest = hashlib.sha256()
        for _, value in sorted(self.state_dict().items()):
            digest.update(value.numpy().tobytes())
        found = {"weights": digest.hexdigest(), "steps": self.seen, "world": self.trainer.world_size}
        with open(f"rank{self.global_rank}.json", "w") as file:
            json.dump(found, file)
'''


@pytest.fixture(scope="module")
def ranks(shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("ddp")
    (folder / "watched.py").write_text(WATCHED)
    (folder / "tmp").mkdir()
    parallel = [
        "--trainer.devices=2",
        "--trainer.strategy=ddp",
        "--trainer.val_check_interval=2",
        "--trainer.log_every_n_steps=1",
    ]
    args = [arg for arg in shelf.all if not arg.startswith("--model=")]
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "grade_lightning_cli", "--model=watched.Watched", *args, *parallel],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path, "HF_DATASETS_CACHE": str(folder / "tmp"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("before (step 0)") == 1  # one process speaks
    return folder, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_both_processes_end_with_the_same_weights(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    _, (one, two) = ranks
    assert one["world"] == two["world"] == 2
    assert len(one["steps"]) == len(two["steps"]) == 2
    assert one["weights"] == two["weights"]


def test_each_process_has_prompts_of_its_own(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    """Together they see each of the sixteen prompts of the epoch once."""
    _, found = ranks
    prompts = [prompt for rank in found for step in rank["steps"] for prompt in step["prompts"]]
    assert len(set(prompts)) == len(prompts) == 16


def test_no_two_rollouts_share_their_noise(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    _, found = ranks
    assert len({step["seed"] for rank in found for step in rank["steps"]}) == 4


def test_there_is_one_log_one_checkpoint_and_one_model(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, _ = ranks
    run = folder / version(method="Watched")
    assert [path.name for path in run.parent.iterdir()] == ["version_0"]
    assert checkpoint(run).is_file()
    assert (run / "export" / "model.safetensors").is_file()
    assert len(scalar(run, "train/reward")) == 2
    assert 0 < scalar(run, "val/reward")[-1] < 1
