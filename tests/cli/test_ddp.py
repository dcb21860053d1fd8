"""Two processes: the same weights, other prompts, other noise, and together the gradient of one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from grade_lightning.kl import KL
from grade_lightning.methods import DAPO, GRPO, PPO, Reinforce, ReinforcePlusPlus
from grade_lightning.policy_gradient import PolicyGradientModule
from grade_lightning.rewards import Reward
from grade_lightning.rollouts import Rollout
from grade_lightning.rows import slice_rows
from tests.cli.conftest import Shelf, assert_same, checkpoint, scalar, version
from tests.methods.test_contract import Toy
from tests.test_policy_gradient import Watch, build, distance, loader, own_weights, prompts

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


# ---- policy gradients -----------------------------------------------------------------------------------------------


class Short(Reward):
    """Toy's reward of short completions; of long ones it says nothing."""

    def forward(self, rollout: Rollout) -> Tensor:
        return Toy().score(rollout).total.masked_fill(rollout.lengths > 6, torch.nan)


CASES: dict[str, tuple[type[PolicyGradientModule], dict[str, Any], int]] = {
    "token mean": (DAPO, {"max_retries": 0}, 1),
    "token mean, accumulated": (DAPO, {"max_retries": 0}, 2),
    "scaled by the batch": (GRPO, {"scale_rewards": "batch"}, 1),
    "whitened": (ReinforcePlusPlus, {"epochs": 2}, 1),
    "one process without rewards": (Reinforce, {"reward": Short(), "num_generations": 1}, 1),
    "values": (PPO, {"epochs": 2, "kl": KL(0.1, target=0.1, horizon=32)}, 1),
}


def fit_case(name: str, rank: int | None, folder: Path, **kwargs: Any) -> tuple[PolicyGradientModule, Watch, Trainer]:
    """Four steps on completions of 1 to 12 tokens: the first process has the short ones, or one process has all."""
    method, settings, accumulate = CASES[name]
    module = build(method, **{"num_generations": 4, "minibatches": 1, "epochs": 1} | settings)
    windows = [prompts(8, module.num_generations, seed) for seed in range(4 // module.epochs)]
    if rank is not None:
        windows = [slice_rows(window, 4 * rank, 4) for window in windows]
    parallel: dict[str, Any] = {"devices": 1} if rank is None else {"devices": 2, "strategy": "ddp"}
    watch = Watch()
    save = ModelCheckpoint(folder / name, "{step}", every_n_train_steps=1, save_top_k=-1)
    fitted = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        accumulate_grad_batches=accumulate,
        log_every_n_steps=1,
        max_steps=4,
        callbacks=[watch] if kwargs else [watch, save],
        enable_checkpointing=not kwargs,
        **parallel,
    )
    fitted.fit(module, loader(*windows, visits=module.epochs * accumulate), **kwargs)
    return module, watch, fitted


def work(folder: Path) -> None:
    """What each of two processes does."""
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    found: dict[str, Any] = {}
    for name in CASES:
        module, watch, _ = fit_case(name, rank, folder)
        found[name] = {"weights": own_weights(module), "running": module.running, "gradients": watch.gradients}
    middle = folder / "values" / "step=3.ckpt"
    module, _, _ = fit_case("values", rank, folder, ckpt_path=middle, weights_only=True)
    found["resumed"] = own_weights(module)
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("together")
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "tests.cli.test_ddp", str(folder)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder, [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_have_the_gradient_of_one(
    name: str, together: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    """One has all the short completions: denominators, whitening, baseline and adaptive β are those of all of them."""
    one, two = (found[name] for found in together[1])
    alone, watch, _ = fit_case(name, None, tmp_path)
    assert len(one["gradients"]) == len(watch.gradients) == 4
    for ours, truth in zip(one["gradients"], watch.gradients, strict=True):
        assert distance(ours, truth) < 1e-6
    assert one["running"] == two["running"] == pytest.approx(alone.running)
    assert bool(alone.running) is (name in ("values", "one process without rewards"))
    assert_same(one["weights"], two["weights"])


def test_a_checkpoint_in_the_middle_of_a_window_holds_the_windows_of_both(
    together: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    """Each goes on with its own; a single process begins a new one."""
    folder, (one, two) = together
    path = folder / "values" / "step=3.ckpt"
    windows = torch.load(path, weights_only=True)["grade_lightning"]["windows"]
    every = prompts(8, 4, seed=1)["columns"]["completions"]
    for window, groups in zip(windows, (every[:4], every[4:]), strict=True):
        ids, mask = window["rollout"]["completion_ids"], window["rollout"]["completion_mask"]
        found = [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]
        assert found == [completion for group in groups for completion in group]
    assert_same(one["resumed"], one["values"]["weights"])
    assert_same(two["resumed"], one["values"]["weights"])
    _, _, fitted = fit_case("values", None, tmp_path, ckpt_path=path, weights_only=True)
    assert fitted.global_step == 4


if __name__ == "__main__":
    work(Path(sys.argv[1]))
