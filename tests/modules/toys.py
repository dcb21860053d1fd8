"""Small policy-gradient runs in a real Trainer: given completions, what each step saw, gradients compared."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader

import grade_lightning.methods
from grade_lightning.data import Source, TextDataModule
from grade_lightning.functional.sequences import token_logps
from grade_lightning.methods import DAPO
from grade_lightning.modules import PolicyGradientModule
from grade_lightning.policies import Pass, Policy
from grade_lightning.records import Experience, Prompts, Rollout
from grade_lightning.rewards import Reward
from grade_lightning.rollouts import Distribution, Engine, Sampler, TransformersEngine
from tests.conftest import VOCABULARY, make_model, make_prompts, make_tokenizer
from tests.methods.toy_task import Toy, trainer, weights

METHODS: list[type[PolicyGradientModule]] = [
    value
    for value in vars(grade_lightning.methods).values()
    if isinstance(value, type) and issubclass(value, PolicyGradientModule)
]
QUICK = "Reinforce", "RLOO", "GRPO", "PPO", "DAPO", "GSPO"
"""Those of the ordinary set where a test runs over all."""
every_method = pytest.mark.parametrize(
    "method",
    [pytest.param(m, marks=[] if m.__name__ in QUICK else pytest.mark.slow, id=m.__name__) for m in METHODS],
)


class Prescribed(Engine):
    """Gives the completions that stand in the column `completions`, G for each prompt, as if it had sampled them."""

    def __init__(self) -> None:
        self.calls = 0

    @torch.no_grad()
    def generate(self, policy: Policy, distribution: Distribution, prompts: Prompts) -> Rollout:
        self.calls += 1
        columns = prompts.columns
        rows = [given[i % len(given)] for i, given in enumerate(columns["completions"])]
        lengths = torch.tensor([len(row) for row in rows])
        ids = torch.full((len(rows), int(lengths.max())), 1)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
        mask = torch.arange(ids.shape[1]) < lengths.unsqueeze(1)
        rollout = Rollout(prompts.ids, prompts.mask, ids, mask, None, policy.tokenizer, columns, [0])
        with policy.evaluating():
            logits = policy(policy.embed(rollout.ids[:, :-1]), rollout.mask[:, :-1], ids.shape[1])
        logps = token_logps(distribution.logits(logits, [0], ids).log_softmax(-1), ids)
        return replace(rollout, engine_logps=logps.masked_fill(~mask, 0))


class Numbered(TransformersEngine):
    """Numbers the completions of each window, from 0, and counts the windows."""

    calls = 0

    def generate(self, policy: Policy, distribution: Distribution, prompts: Prompts) -> Rollout:
        self.calls += 1
        rollout = super().generate(policy, distribution, prompts)
        return replace(rollout, columns={"number": list(range(len(rollout.ids)))})


class Watch(Callback):
    """Of each visit the rows and what was logged; of each optimizer step the gradient, learning rate and weights."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = []
        self.logged: list[dict[str, float]] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.rates: list[float] = []
        self.before: list[dict[str, Tensor]] = []
        self.stepped_after: list[int] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        grads = {name: p.grad for name, p in pl_module.named_parameters() if p.grad is not None}
        self.gradients.append({name: grad.clone() for name, grad in grads.items()})
        self.rates.append(optimizer.param_groups[0]["lr"])
        self.before.append(own_weights(pl_module))
        self.stepped_after.append(len(self.rows))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.rows.append(pl_module.last_rollout[0].columns.get("number", []))
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def own_weights(module: PolicyGradientModule) -> dict[str, Tensor]:
    """Each once: GPT-2's table has two names."""
    return {name: value for name, value in weights(module).items() if "lm_head" not in name}


def constant(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


def build(
    method: type[PolicyGradientModule], dtype: torch.dtype = torch.float64, lr: float = 0.05, **kwargs: Any
) -> PolicyGradientModule:
    """A method on a small GPT-2 that reads its completions from the data; it is trained by plain gradient descent."""
    settings: dict[str, Any] = {
        "reward": Toy(),
        "sampler": Sampler(12, engine=Prescribed()),
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=lr),
        "lr_scheduler": constant,
    }
    training_pass: Pass | None = kwargs.pop("training_pass", None)
    policy = Policy.from_model(make_model("gpt2", dtype, scale=4.0), make_tokenizer(), training_pass=training_pass)
    module = method(policy=policy, **settings | kwargs)
    module.configure_model()
    return module


def plain(method: type[PolicyGradientModule], **kwargs: Any) -> dict[str, Any]:
    """Settings with which a window is one step: no minibatches, epochs or other prompts to fall back on."""
    settings: dict[str, Any] = {"epochs": 1, "minibatches": 1, "num_generations": 4}
    return settings | ({"max_retries": 0} if method is DAPO else {}) | kwargs


def prompts(count: int, size: int = 4, seed: int = 0, shortest: int = 1) -> dict[str, Any]:
    """Prompts with `size` completions each: the first are short, the last long."""
    generator = torch.Generator().manual_seed(seed)
    batch = {name: x.repeat(-(-count // 3), 1)[:count] for name, x in make_prompts().items()}
    lengths = torch.linspace(shortest, 12, count * size).long().tolist()
    rows = [torch.randint(2, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    groups = [rows[i : i + size] for i in range(0, len(rows), size)]
    return batch | {"columns": {"completions": groups}}


def loader(*windows: dict[str, Any], visits: int = 1) -> DataLoader[Any]:
    """Each window as often as it is visited."""
    rows: Any = [window for window in windows for _ in range(visits)]
    return DataLoader(rows, batch_size=None)


def run(module: PolicyGradientModule, *windows: dict[str, Any], **kwargs: Any) -> Watch:
    watch = Watch()
    visits = module.epochs * module.minibatches * kwargs.get("accumulate_grad_batches", 1)
    callbacks = [watch, *kwargs.pop("callbacks", [])]
    trainer(callbacks=callbacks, log_every_n_steps=1, **kwargs).fit(module, loader(*windows, visits=visits))
    return watch


def flat(values: dict[str, Tensor]) -> Tensor:
    return torch.cat([values[name].flatten().double() for name in sorted(values)])


def distance(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    """Relative to the size of both, which must not be nothing."""
    assert one.keys() == two.keys()
    size = float(flat(two).norm())
    assert size > 1e-4
    return float((flat(one) - flat(two)).norm()) / size


class Lines(Source):
    """Prompts of two or three words."""

    def load(self) -> DatasetDict:
        rows = [f"w{2 + i % 17} w{2 + i // 17}" + " w5" * (i % 2) for i in range(80)]
        return DatasetDict(train=Dataset.from_dict({"prompt": rows}))


def data(batch_size: int, **kwargs: Any) -> TextDataModule:
    sizes: dict[str, Any] = {"prompt_size": 48, "val_size": 4, "test_size": 4, "max_prompt_tokens": 6}
    return TextDataModule(Lines(), batch_size, **sizes | kwargs)


def move(module: PolicyGradientModule) -> None:
    """Away from the reference; the check of the first batch is for runs that begin at it."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.policy.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    module._started = False


def states(module: PolicyGradientModule) -> dict[str, dict[str, Any]]:
    """What the parts remember."""
    content: dict[str, Any] = {}
    module.on_save_checkpoint(content)
    found: dict[str, dict[str, Any]] = content["grade_lightning"]["parts"]
    return found


class Keep(Callback):
    """The window as it is while it is trained on."""

    window: Experience

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        if pl_module._window is not None:
            self.window = pl_module._window.experience


class Choosy(Reward):
    """Toy's reward; abstains where the completion begins with an even token, and on all completions of long prompts."""

    def forward(self, rollout: Rollout) -> Tensor:
        abstains = (rollout.completion_ids[:, 0] % 2 == 0) | rollout.prompt_mask.bool().all(-1)
        return Toy().score(rollout).total.masked_fill(abstains, torch.nan)


def begun(window: dict[str, Any], other: bool = False) -> dict[str, Any]:
    """Every second completion begins with an even token; `other`: where Choosy abstains, the rest is another text."""
    groups = []
    for mask, group in zip(window["attention_mask"], window["columns"]["completions"], strict=True):
        rows = [[4 + (j + 1) % 2, *row[1:]] for j, row in enumerate(group)]
        abstains = [bool(mask.all()) or row[0] == 4 for row in rows]
        if other:
            changed = [[row[0], *(2 + (token + 5) % 17 for token in row[1:])] for row in rows]
            rows = [new if abstain else row for new, row, abstain in zip(changed, rows, abstains, strict=True)]
        groups.append(rows)
    return window | {"columns": {"completions": groups}}


def gradient(module: PolicyGradientModule, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Of one draw, without a Trainer."""
    module.zero_grad()
    module.draw_loss(batch).backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
