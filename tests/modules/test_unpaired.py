"""KTO: labelled rows of the data through the DataModule, labels of rollouts, z₀, and the loss by hand."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from grade_lightning.data import InMemory, TextDataModule
from grade_lightning.errors import InputError
from grade_lightning.methods import KTO
from grade_lightning.modules.unpaired import mismatched
from grade_lightning.policies import Policy
from grade_lightning.records import Prompts
from grade_lightning.rewards import NoReward
from grade_lightning.rollouts import Sampler
from tests.conftest import make_model, make_tokenizer
from tests.methods.toy_task import Toy, trainer
from tests.modules.test_preference import Given, gradients, log_ratios
from tests.modules.toys import Prescribed, Watch, constant, distance, loader, prompts

pytestmark = pytest.mark.usefixtures("own_random_state")
Pairs = list[tuple[list[int], list[int]]]


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


class Batches(Callback):
    """The prompts of each training batch."""

    def __init__(self) -> None:
        self.prompts: list[list[str]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.prompts.append(batch["columns"]["prompt"])


def make(lr: float = 0.02, **kwargs: Any) -> KTO:
    settings: dict[str, Any] = {
        "reward": None if kwargs.get("labels") == "data" else Toy(),
        "sampler": Sampler(12, engine=None if kwargs.get("labels") == "data" else Prescribed()),
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=lr),
        "lr_scheduler": constant,
    }
    policy = Policy.from_model(make_model("gpt2", torch.float64, scale=4.0), make_tokenizer())
    module = KTO(policy=policy, **settings | kwargs)
    module.configure_model()
    return module


def by_hand(state: dict[str, Tensor], rows: Pairs, labels: list[int | None], **weights: float) -> tuple[Any, Tensor]:
    """The model and its loss with z₀ of each prompt with the completion of the row before; as TRL has it."""
    shifted = [(prompt, rows[i - 1][1]) for i, (prompt, _) in enumerate(rows)]
    _, others = log_ratios(state, shifted, temperature=1.0)
    point = max(0.0, float(sum(x.detach().sum() for x in others)) / len(rows))
    model, ratios = log_ratios(state, rows, temperature=1.0)
    losses = [
        weights["good"] * (1 - torch.sigmoid(weights["beta"] * (x.sum() - point)))
        if label
        else weights["bad"] * (1 - torch.sigmoid(weights["beta"] * (point - x.sum())))
        for x, label in zip(ratios, labels, strict=True)
        if label is not None
    ]
    return model, torch.stack(losses).sum() / len(rows)


def labelled(count: int) -> list[dict[str, Any]]:
    """As in TRL: a prompt, a completion and whether it is desirable; those have high words."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for i in range(count):
        low, high = (11, 19) if i % 2 else (2, 9)
        words = torch.randint(low, high, (1 + i % 5,), generator=generator)
        completion = "".join(f" w{int(word)}" for word in words)
        rows.append({"prompt": f"w{2 + i % 17} w{2 + i // 17}", "completion": completion, "label": bool(i % 2)})
    return rows


def data(rows: list[dict[str, Any]], **kwargs: Any) -> TextDataModule:
    sizes: dict[str, Any] = {"batch_size": 4, "prompt_size": 24, "val_size": 8, "test_size": 4}
    return TextDataModule(InMemory(rows), **sizes | {"max_prompt_tokens": 5, "max_text_tokens": 12} | kwargs)


def test_labelled_rows_of_the_data_against_plain_transformers() -> None:
    """Loss and gradient of each step from the rows' own texts; no row is lost to a reward model's split."""
    rows, seen, watch = labelled(36), Batches(), Watch()
    texts = {row["prompt"]: row for row in rows}
    module = make(lr=2.0, beta=0.3, labels="data", desirable_weight=1.5, undesirable_weight=0.7)
    source = data(rows)
    trainer(max_steps=3, callbacks=[watch, seen], log_every_n_steps=1).fit(module, datamodule=source)
    assert len(source.splits["reward"]) == 0
    tokenizer, points = make_tokenizer(), []
    for step, batch in enumerate(seen.prompts):
        given = [
            ([0, *tokenizer.encode(prompt)], [*tokenizer.encode(texts[prompt]["completion"]), 0]) for prompt in batch
        ]
        labels = [texts[prompt]["label"] for prompt in batch]
        model, loss = by_hand(watch.before[step], given, labels, beta=0.3, good=1.5, bad=0.7)
        loss.backward()
        logged = watch.logged[step]
        assert logged["train/loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
        assert distance(watch.gradients[step], gradients(model)) < 1e-5
        assert logged["train/desirable"] == sum(labels) / 4
        points.append(logged["train/z0"])
    assert max(points[1:]) > 0.01


def test_rollouts_are_labelled_by_their_reward() -> None:
    """Those on which it abstains are left out; the threshold itself is desirable."""
    rewards: list[list[float | None]] = [[0.9], [0.6], [None], [0.1], [0.59], [1.0]]
    batch = prompts(6, 1)
    batch |= {"columns": batch["columns"] | {"rewards": rewards}}
    watch = Watch()
    module = make(lr=2.0, reward=Given(), beta=0.2, threshold=0.6)
    trainer(callbacks=[watch], log_every_n_steps=1).fit(module, loader(batch, batch))
    rows = [
        (ids[mask.bool()].tolist(), given[0])
        for ids, mask, given in zip(
            batch["input_ids"], batch["attention_mask"], batch["columns"]["completions"], strict=True
        )
    ]
    for step in range(2):
        labels: list[int | None] = [1, 1, None, 0, 0, 1]
        model, loss = by_hand(watch.before[step], rows, labels, beta=0.2, good=1, bad=1)
        loss.backward()
        assert watch.logged[step]["train/loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
        assert distance(watch.gradients[step], gradients(model)) < 1e-5
        assert watch.logged[step]["train/desirable"] == pytest.approx(3 / 5)


@pytest.mark.parametrize("z0", ["exact", "none"])
def test_the_other_reference_points(z0: Any) -> None:
    """The exact KL of what was sampled, as it is logged; or nothing."""
    watch, batch = Watch(), prompts(6, 1)
    module = make(lr=2.0, reward=Given(), z0=z0)
    batch |= {"columns": batch["columns"] | {"rewards": [[float(i % 2)] for i in range(6)]}}
    trainer(callbacks=[watch], log_every_n_steps=1).fit(module, loader(batch, batch))
    point, kl = (watch.logged[1][f"train/{name}"] for name in ("z0", "kl"))
    assert kl > 0.01
    assert point == (pytest.approx(kl) if z0 == "exact" else 0)


def test_the_reference_point_is_clamped_after_the_mean_over_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process has −3 where this one has 1: together they have nothing, and not a half."""

    class Two:
        def mean(self, values: Tensor) -> Tensor:
            return (values - 3) / 2

    module = make()
    monkeypatch.setattr(KTO, "reduce", Two())
    seen: Any = SimpleNamespace(extra={"mismatched": torch.tensor([0.5, 1.5])})
    assert module.reference_point(seen, seen) == 0


def test_the_row_before_is_of_another_prompt() -> None:
    module = make()
    rollout = module.sampler(module.policy, Prompts.of(prompts(4, 1)))
    shifted = mismatched(rollout)
    assert shifted.prompts == rollout.prompts
    assert shifted.completions == [rollout.completions[-1], *rollout.completions[:-1]]
    assert shifted.engine_logps is None


def test_what_cannot_work_is_named() -> None:
    with pytest.raises(InputError, match=r"z0 = exact.*labels = data"):
        make(labels="data", z0="exact")
    with pytest.raises(InputError, match=r"batch_size = 1: must be at least 2"):
        make().batching.rows(1)
    assert make(z0="exact").batching.rows(1) == 1
    assert isinstance(make(labels="data").reward, NoReward)


def test_labels_are_learnt_and_held_out_ones_are_told_apart() -> None:
    """Held out, a desirable completion's log-ratio is above another's: from even odds to nearly always."""
    module = make(labels="data", optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-2))
    source = data(labelled(36))
    (before,) = trainer().validate(module, datamodule=source, verbose=False)
    trainer(max_epochs=2).fit(module, datamodule=source)
    (after,) = trainer().validate(module, datamodule=source, verbose=False)
    assert before["val/auroc"] == 0.5
    assert after["val/auroc"] > 0.9
    assert not [name for name, value in after.items() if math.isnan(value)]
