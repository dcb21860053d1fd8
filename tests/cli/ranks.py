"""Two steps of every method on fixed completions: on one process, or on two of which each has half of the rows."""

import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.distributed.tensor import DTensor

from grade_lightning.methods import AEPO, AgenticAEPO, RewardModel, SupervisedFineTuning, ZerothOrder
from grade_lightning.modules import (
    AlignmentModule,
    PairwiseModule,
    PolicyGradientModule,
    PreferenceModule,
    TrainableModule,
    UnpairedModule,
)
from grade_lightning.modules.measuring import measure
from grade_lightning.policies import LoRA, Policy
from grade_lightning.records import Rollout
from grade_lightning.rewards import Reward
from grade_lightning.rollouts import Sampler
from grade_lightning.schedules import Constant
from tests.conftest import VOCABULARY, make_model, make_tokenizer
from tests.methods.toy_task import METHODS, Toy
from tests.modules.toys import Prescribed, constant, loader, prompts

Case = tuple[type[TrainableModule], bool]
EVERY: dict[str, Case] = {
    f"{method.__name__}{' with LoRA' if lora else ''}": (method, lora)
    for method in (*METHODS, SupervisedFineTuning, RewardModel)
    for lora in (False, True)
    if not (lora and method is RewardModel)
}
QUICK = "GradeSTE", "GradeSTE with LoRA", "PPO", "DPO", "RewardModel"
every_case = pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in QUICK else pytest.mark.slow) for case in EVERY]
)
DDP_ALONE = "STPPO", "STPPO with LoRA", "EGPO", "EGPO with LoRA", "ZerothOrder", "ZerothOrder with LoRA"
"""What takes two gradients of one pass, or copies or moves whole weights: FSDP2 can give neither."""


class Keep(Callback):
    """The whole gradient of each step, and how much of the trained weights this process has then."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []
        self.share = 1.0

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        trained = {name: p for name, p in pl_module.named_parameters() if p.requires_grad}
        self.gradients.append({name: full(p.grad).clone() for name, p in trained.items() if p.grad is not None})
        own = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in trained.values())
        self.share = own / sum(p.numel() for p in trained.values())


class Likelihood(Reward):
    """How likely the policy finds a completion: given ones have another reward when it moves."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = (policy,)  # no part of the reward

    def forward(self, rollout: Rollout) -> Tensor:
        return measure(self.policy[0], Sampler(12).distribution, rollout).logps.sum(-1)


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def make(case: str, backbone: Path, **kwargs: Any) -> TrainableModule:
    method: Any
    method, lora = EVERY[case]
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.05),
        "lr_scheduler": constant,
    }
    if method is RewardModel:
        module: TrainableModule = method(backbone=str(backbone), hidden=6, **settings | kwargs)
        return module
    # entropies that differ little, over their spread; values that differ little, over ε
    dtype = torch.float64 if method in (AgenticAEPO, ZerothOrder) else torch.float32
    model = make_model("llama" if lora else "gpt2", dtype, scale=4.0)  # an untied head and a tied one
    settings["policy"] = Policy.from_model(model, make_tokenizer(), LoRA(r=4, dropout=0.0) if lora else None)
    if issubclass(method, AlignmentModule):
        settings |= {"reward": Toy(), "sampler": Sampler(12, engine=Prescribed())}
    if method is ZerothOrder:
        settings["reward"] = Likelihood(settings["policy"])
    if issubclass(method, PolicyGradientModule):
        settings |= {"num_generations": 4, "epochs": 1, "minibatches": 1}
    if issubclass(method, UnpairedModule):
        settings["z0"] = "exact"  # which row is before another one depends on the process
    options: dict[str, Any] = {"max_retries": 0, "hops": "exact"}
    options |= {"min_rollouts": 4, "max_rollouts": 4}  # KnapsackRL: each process has a budget of its own
    options |= {"row_share": Constant(1.0), "token_share": Constant(1.0)}  # D3S: each chooses among its own rows
    settings |= {name: value for name, value in options.items() if name in inspect.signature(method).parameters}
    module = method(**settings | kwargs)
    return module


def batches(case: str, rank: int | None, steps: int = 2) -> list[dict[str, Any]]:
    """Eight rows for each step; of two processes the first has those with the short completions."""
    method, _ = EVERY[case]
    size = 4 if issubclass(method, (PairwiseModule, PolicyGradientModule, PreferenceModule)) else 1
    found = [prompts(8, size, seed) for seed in range(steps)]
    if not issubclass(method, AlignmentModule):
        for seed, batch in enumerate(found):
            generator = torch.Generator().manual_seed(seed)
            batch["input_ids"] = torch.randint(2, VOCABULARY, (8, 7), generator=generator)
            batch["attention_mask"] = (torch.arange(7) < torch.tensor([2, 3, 3, 4, 5, 6, 7, 7]).unsqueeze(1)).long()
            batch["labels"] = torch.arange(8) % 3 % 2
    if method is AEPO and rank is None:  # the first quarter of the prompts is that of each of two processes
        found = [rows(batch, torch.tensor([0, 4, 1, 2, 3, 5, 6, 7])) for batch in found]
    return found if rank is None else [rows(batch, slice(4 * rank, 4 * rank + 4)) for batch in found]


def rows(batch: dict[str, Any], some: slice | Tensor) -> dict[str, Any]:
    return {name: rows(value, some) if isinstance(value, dict) else of(value, some) for name, value in batch.items()}


def of(values: Any, some: slice | Tensor) -> Any:
    return [values[i] for i in some] if isinstance(values, list) and isinstance(some, Tensor) else values[some]


def trainer(rank: int | None, strategy: str, **kwargs: Any) -> Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1 if rank is None else 2,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "use_distributed_sampler": False,
        "log_every_n_steps": 1,
        "max_steps": 2,
        "gradient_clip_val": 0.5,
    }
    return Trainer(**settings | ({} if rank is None else {"strategy": strategy}) | kwargs)


@contextmanager
def no_noise() -> Iterator[None]:
    """So that the soft tokens of one process are those of two."""
    with patch("grade_lightning.rollouts.relaxed.exponential_noise", torch.ones_like):
        yield


def two_steps(case: str, backbone: Path, rank: int | None = None, strategy: str = "auto") -> dict[str, Any]:
    """The second step starts from weights that a clipped gradient has moved."""
    module, keep = make(case, backbone), Keep()
    with no_noise():
        trainer(rank, strategy, callbacks=[keep]).fit(module, loader(*batches(case, rank)))
    return {"gradients": keep.gradients, "share": keep.share}


def launch(*command: str, folder: Path, timeout: int = 240, **env: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([str(folder), root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path, "HF_DATASETS_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"} | env,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
