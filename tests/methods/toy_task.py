"""A toy task for every method: a small random model, a reward of its tokens, and a real Trainer."""

import inspect
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader

import grade_lightning.methods
from grade_lightning.modules import AlignmentModule
from grade_lightning.policies import LoRA, Policy
from grade_lightning.rewards import DifferentiableReward
from grade_lightning.rollouts import Sampler
from grade_lightning.schedules import Constant
from tests.conftest import VOCABULARY, make_model, make_prompts, make_tokenizer

METHODS = [
    value
    for value in vars(grade_lightning.methods).values()
    if isinstance(value, type) and issubclass(value, AlignmentModule) and value.has_gradient
]
SCALE = 8.0  # of the weights: a fixed head must be able to tell tokens apart
CORE = "GradeSTE", "Grade", "RLOO", "PPO", "DAPO", "DPO"
"""Those that every test of the ordinary set runs over; the slow set has all."""
QUICK = "GradeSTE", "RLOO", "PPO", "DPO"
"""One of each family: those that stand for the others where a test takes long."""


def over(*ordinary: str) -> pytest.MarkDecorator:
    """All methods, of which those that are not named here are in the slow set."""
    marked = [pytest.param(m, marks=[] if m.__name__ in ordinary else pytest.mark.slow, id=m.__name__) for m in METHODS]
    return pytest.mark.parametrize("method", marked)


WINDOWS = {"ZerothOrder": 48}
"""Steps of those that need more than others until their reward has risen."""


each_method = over(*(method.__name__ for method in METHODS if method.__name__ not in WINDOWS))
every_method = over(*CORE)
some_methods = over(*QUICK)


def full_and_lora(full: Iterable[str], lora: Iterable[str]) -> pytest.MarkDecorator:
    """All methods, with all weights trained and with LoRA; those that are not named are in the slow set."""
    marked = [
        pytest.param(m, own, marks=[] if m.__name__ in named else pytest.mark.slow, id=f"{kind}-{m.__name__}")
        for own, kind, named in ((False, "full", {*full}), (True, "lora", {*lora}))
        for m in METHODS
    ]
    return pytest.mark.parametrize(("method", "lora"), marked)


with_and_without_lora = pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])


class Toy(DifferentiableReward):
    """The fraction of tokens with an id above 9. Its buffer belongs in no checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frozen", torch.zeros(1))

    def table(self) -> Tensor:
        return torch.eye(VOCABULARY)

    def score_embeddings(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        return (embeddings[..., 10:].sum(-1) * mask).sum(-1) / mask.sum(-1)


class Recorder(Callback):
    """Keeps what each training step logged, and which parameters had a gradient."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.without_gradient: list[set[str]] = []  # of each step

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        trained = {name: p for name, p in pl_module.named_parameters() if p.requires_grad}
        self.without_gradient.append({name for name, p in trained.items() if p.grad is None or not p.grad.any()})
        assert all(p.grad is None for p in pl_module.parameters() if not p.requires_grad)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.steps.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def make(
    method: type[AlignmentModule], lora: bool = False, lr: float = 1e-2, seed: int = 0, **kwargs: Any
) -> AlignmentModule:
    model = make_model("llama", scale=SCALE)
    seed_everything(seed, verbose=False)
    policy = Policy.from_model(model, make_tokenizer(), LoRA(r=4, dropout=0.0) if lora else None)
    settings: dict[str, Any] = {
        "sampler": Sampler(max_new_tokens=6),
        "optimizer": lambda parameters: torch.optim.Adam(parameters, lr=lr),
        "lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0),
    }
    parameters = inspect.signature(method).parameters
    if not method.has_gradient:
        del settings["optimizer"], settings["lr_scheduler"]
    if "kl" in parameters:
        settings["kl"] = replace(parameters["kl"].default, beta=0.1 * parameters["kl"].default.beta)  # a tiny reward
    schedules = {"tau": 1.0, "row_share": 0.5, "token_share": 0.5}
    for name in schedules.keys() & set(parameters):  # over the run, it would see that a resumed run is a longer one
        settings[name] = Constant(schedules[name])
    return method(policy=policy, reward=Toy(), **settings | kwargs)


def batches(count: int = 2, repeat: int = 4) -> DataLoader[Any]:
    prompts = {name: value.repeat(repeat, 1) for name, value in make_prompts().items()}
    return DataLoader([prompts | {"columns": {}}] * count, batch_size=None)  # type: ignore[arg-type]


def trainer(**kwargs: Any) -> Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "max_epochs": 1,
    }
    return Trainer(**quiet | kwargs)


def fit(module: AlignmentModule, steps: int, loader: DataLoader[Any] | None = None, **kwargs: Any) -> Recorder:
    recorder = Recorder()
    loader = batches(steps) if loader is None else loader
    trainer(callbacks=[recorder], log_every_n_steps=1, **kwargs).fit(module, loader)
    return recorder


def assert_the_reward_rises(
    method: type[AlignmentModule],
    lora: bool = False,
    windows: int | None = None,
    settings: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Recorder:
    """Over two seeds and 96 completions a window, by more than four standard errors of that gain.

    With 12 completions a window what a run gains varies by a third of it and more from seed to seed, most with several
    steps for each rollout and LoRA; with 96 by a twentieth.
    """
    gains = []
    windows = windows or WINDOWS.get(method.__name__, 12)
    for seed in (0, 1):
        module = make(method, lora, seed=seed, **settings or {})
        steps = module.batching.steps_per_batch
        run = fit(module, windows * steps, batches(windows * steps, repeat=32), **kwargs)
        rewards = [step["train/reward"] for step in run.steps[::steps]]
        gains.append(sum(rewards[-4:]) / 4 - rewards[0])
    spread = run.steps[0]["train/reward_std"]
    error = spread * ((1 / 96 + 1 / (4 * 96)) / len(gains)) ** 0.5
    assert sum(gains) / len(gains) > 4 * error, (gains, error)
    return run


def weights(module: AlignmentModule) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def trained_names(module: AlignmentModule) -> set[str]:
    """With both names of tied weights, as in a state."""
    return {name for name, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}


def assert_same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    assert [name for name, value in one.items() if not torch.equal(value, two[name])] == []
