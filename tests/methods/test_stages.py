"""The stages before alignment: supervised fine-tuning and reward modelling, on toy text."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor
from torch.utils.data import DataLoader

from grade_lightning.errors import InputError
from grade_lightning.methods import RewardModel, SupervisedFineTuning
from grade_lightning.policies import LoRA, Policy
from grade_lightning.rewards import ClassifierReward
from grade_lightning.rollouts import Rollout
from tests.conftest import VOCABULARY, make_model, make_tokenizer


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2)


def constant(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_model("llama", scale=3.0).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


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


def text(count: int) -> DataLoader[Any]:
    """Ascending words from a random start, padded on the right: the next word is certain, the first is not."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(count):
        ids = 2 + (torch.randint(17, (8, 1), generator=generator) + torch.arange(7)) % 17
        mask = (torch.arange(7) < torch.randint(3, 8, (8, 1), generator=generator)).long()
        rows.append({"input_ids": ids.where(mask.bool(), 1), "attention_mask": mask})
    return DataLoader(rows, batch_size=None)  # type: ignore[arg-type]


def labelled(count: int) -> DataLoader[Any]:
    """Random words; positive where w3 is among them, which it is in half of the rows."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for _ in range(count):
        ids = torch.randint(4, VOCABULARY, (16, 6), generator=generator)
        labels = torch.arange(16) % 2
        places = torch.randint(6, (16, 1), generator=generator)
        ids = torch.where(labels.bool().unsqueeze(1), ids.scatter(1, places, 3), ids)
        rows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return DataLoader(rows, batch_size=None)  # type: ignore[arg-type]


def saved_keys(run: Trainer, path: Path) -> set[str]:
    run.save_checkpoint(path)
    return set(torch.load(path, weights_only=False)["state_dict"])


def trained_keys(module: LightningModule) -> set[str]:
    return {name for name, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_supervised_training_learns_and_its_folder_is_a_policy(lora: bool, folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = SupervisedFineTuning(Policy(str(folder), LoRA(r=8, dropout=0.0) if lora else None), optimizer=adam)
    (before,) = trainer().validate(module, text(2), verbose=False)
    assert before["val/perplexity"] > 15
    run = trainer()
    run.fit(module, text(60))
    (after,) = trainer().test(module, text(2), verbose=False)
    assert after["test/loss"] < before["val/loss"] - (0.5 if lora else 1.5)
    assert after["test/perplexity"] == pytest.approx(math.exp(after["test/loss"]), rel=1e-5)
    assert module.policy.reference is None
    assert saved_keys(run, tmp_path / "a.ckpt") == trained_keys(module)

    module.save_pretrained(str(tmp_path / "policy"))
    again = SupervisedFineTuning(Policy(str(tmp_path / "policy")))
    (loaded,) = trainer().test(again, text(2), verbose=False)
    assert loaded["test/loss"] == pytest.approx(after["test/loss"], rel=1e-4)


def test_perplexity_does_not_depend_on_the_batches(folder: Path) -> None:
    """It is of all tokens: one batch of unequal rows, and each row by itself."""
    (batch,) = text(1)
    rows = [{name: value[i : i + 1] for name, value in batch.items()} for i in range(8)]
    one, eight = (
        trainer().validate(
            SupervisedFineTuning(Policy(str(folder))),
            DataLoader(batches, batch_size=None),  # type: ignore[arg-type]
            verbose=False,
        )[0]
        for batches in ([batch], rows)
    )
    for name in ("val/loss", "val/perplexity"):
        assert one[name] == pytest.approx(eight[name], rel=1e-5)


def test_supervised_loss_is_that_of_transformers(folder: Path) -> None:
    """Labels of −100 where there is padding; the shift is theirs."""
    module = SupervisedFineTuning(Policy(str(folder)))
    module.configure_model()
    batch = next(iter(text(1)))
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    truth = make_model("llama", scale=3.0)(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels
    ).loss
    torch.testing.assert_close(module.loss(batch), truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frozen", [False, True], ids=["all", "head"])
def test_a_reward_model_learns_and_its_folder_is_a_reward(frozen: bool, folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = RewardModel(str(folder), freeze_backbone=frozen, hidden=32, optimizer=adam)
    module.configure_model()
    classifier = module.classifier
    assert classifier is not None
    start = {name: value.clone() for name, value in classifier.state_dict().items()}
    run = trainer()
    run.fit(module, labelled(60))
    moved = {name for name, value in classifier.state_dict().items() if not torch.equal(value, start[name])}
    expected = {name for name in start if name.startswith("head.") or not frozen}
    assert moved == expected
    saved = saved_keys(run, tmp_path / "a.ckpt")
    assert saved == trained_keys(module)
    assert all(name.startswith("classifier.head.") for name in saved) is frozen

    (found,) = trainer().test(module, labelled(4), verbose=False)
    assert set(found) == {"test/loss", "test/accuracy", "test/auroc", "test/calibration_error"}
    assert found["test/auroc"] > (0.75 if frozen else 0.97)
    assert found["test/accuracy"] > (0.6 if frozen else 0.9)

    module.save_pretrained(str(tmp_path / "reward"))
    reward = ClassifierReward(str(tmp_path / "reward"))
    reward.load(make_tokenizer(), VOCABULARY)
    batch = next(iter(labelled(1)))
    ids: Tensor = batch["input_ids"]
    rollout = Rollout(
        prompt_ids=ids[:, :4],
        prompt_mask=torch.ones_like(ids[:, :4]),
        completion_ids=ids[:, 4:],
        completion_mask=torch.ones(16, 2, dtype=torch.bool),
        logps=torch.zeros(16, 2),
        tokenizer=make_tokenizer(),
    )
    with torch.no_grad():
        torch.testing.assert_close(reward(rollout), module(batch).sigmoid(), rtol=1e-4, atol=1e-5)


def test_reward_metrics_are_those_of_the_whole_epoch(folder: Path) -> None:
    """Accuracy, area under the curve and calibration over both batches together, by plain loops."""
    torch.manual_seed(0)
    module = RewardModel(str(folder), hidden=8, optimizer=adam)
    trainer(max_steps=5).fit(module, labelled(5))
    loader = labelled(2)
    (found,) = trainer().validate(module, loader, verbose=False)
    with torch.no_grad():
        probs = torch.cat([module(batch).sigmoid() for batch in loader])
    labels = torch.cat([batch["labels"] for batch in loader])
    positive, negative = probs[labels == 1], probs[labels == 0]
    pairs = (positive[:, None] > negative).double() + 0.5 * (positive[:, None] == negative)
    assert found["val/auroc"] == pytest.approx(float(pairs.mean()), abs=1e-5)
    assert found["val/accuracy"] == pytest.approx(float(((probs > 0.5) == labels.bool()).double().mean()), abs=1e-5)


@pytest.mark.parametrize("stage", [SupervisedFineTuning, RewardModel])
def test_what_is_not_finite_reaches_no_weight(stage: type[Any], folder: Path, tmp_path: Path) -> None:
    """Three such batches end the run; the texts of the last lie where its logs would."""

    class Spoilt(stage):
        def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
            loss: Tensor = super().training_step(batch, batch_idx)
            return loss * (math.nan if batch_idx > 0 else 1.0)

    where = {"policy": Policy(str(folder))} if stage is SupervisedFineTuning else {"backbone": str(folder)}
    module, run = Spoilt(optimizer=adam, **where), trainer(default_root_dir=tmp_path)
    with pytest.raises(InputError, match=r"3 batches in a row .* the last at step 3; .* lies in"):
        run.fit(module, text(5) if stage is SupervisedFineTuning else labelled(5))
    assert module.skipped == 3
    assert all(value.isfinite().all() for value in module.state_dict().values())
    (path,) = tmp_path.glob("not_finite_step_3_rank_0.json")
    assert json.loads(path.read_text())[0]["text"].startswith("w")


@pytest.mark.parametrize("stage", [SupervisedFineTuning, RewardModel])
def test_a_draw_is_of_the_whole_batch_and_has_noise_of_its_own(stage: type[Any], folder: Path) -> None:
    """As the gradient's variance wants it: whatever a training step is a part of, and however that is seeded."""
    sft = stage is SupervisedFineTuning
    module = SupervisedFineTuning(Policy(str(folder))) if sft else RewardModel(str(folder))
    module.configure_model()
    (batch,) = text(1) if sft else labelled(1)
    whole = float(module.training_step(batch, 0))
    module.trainer = trainer(accumulate_grad_batches=4)
    assert float(module.draw_loss(batch)) == pytest.approx(whole, rel=1e-6)
    table = next(part for part in module.modules() if isinstance(part, torch.nn.Embedding))
    table.register_forward_hook(lambda part, ids, embedded: embedded + torch.randn_like(embedded))
    assert float(module.draw_loss(batch)) != float(module.draw_loss(batch))


def test_a_micro_batch_that_predicts_nothing(folder: Path) -> None:
    """Beside others its part of the step is 0."""
    module = SupervisedFineTuning(Policy(str(folder)), optimizer=adam)
    ids = torch.tensor([[2, 3, 4, 5], [6, 7, 8, 9], [2, 1, 1, 1], [3, 1, 1, 1]])
    rows = [{"input_ids": ids, "attention_mask": (ids != 1).long()}] * 2
    trainer(accumulate_grad_batches=2).fit(module, DataLoader(rows, batch_size=None))  # type: ignore[arg-type]
    assert module.skipped == 0


def test_a_checkpoint_of_another_stage_is_named(folder: Path, tmp_path: Path) -> None:
    run = trainer(max_steps=1)
    run.fit(SupervisedFineTuning(Policy(str(folder))), text(1))
    run.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(InputError, match="of SupervisedFineTuning, but --model is RewardModel"):
        trainer().fit(RewardModel(str(folder)), labelled(1), ckpt_path=os.fspath(tmp_path / "a.ckpt"))


def test_stages_resume_where_they_stopped(folder: Path, tmp_path: Path) -> None:
    def stage() -> RewardModel:
        torch.manual_seed(0)
        return RewardModel(str(folder), hidden=8, optimizer=adam, lr_scheduler=constant)

    whole, half, resumed = stage(), stage(), stage()
    torch.manual_seed(0)
    trainer(max_epochs=2).fit(whole, labelled(3))
    torch.manual_seed(0)
    run = trainer()
    run.fit(half, labelled(3))
    run.save_checkpoint(tmp_path / "a.ckpt")
    trainer(max_epochs=2).fit(resumed, labelled(3), ckpt_path=tmp_path / "a.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_every_token_of_a_step_weighs_the_same() -> None:
    """Two micro-batches whose texts have different lengths are one batch, which is given out twice."""
    found = []
    for parts in (1, 2):
        policy = Policy.from_model(make_model("llama", scale=3.0), make_tokenizer(), reference=False)
        module = SupervisedFineTuning(policy, lambda parameters: torch.optim.SGD(parameters, lr=0.1), constant)
        (batch,) = text(1)
        order = batch["attention_mask"].sum(1).argsort()
        rows: Any = [{name: value[order] for name, value in batch.items()}] * parts
        trainer(accumulate_grad_batches=parts).fit(module, DataLoader(rows, batch_size=None))
        found.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    torch.testing.assert_close(*found, rtol=0, atol=1e-6)


def test_the_number_of_micro_batches_must_stay() -> None:
    policy = Policy.from_model(make_model("llama"), make_tokenizer(), reference=False)
    scheduler = GradientAccumulationScheduler({0: 1, 1: 2})
    with pytest.raises(InputError, match=r"GradientAccumulationScheduler.*accumulate_grad_batches"):
        trainer(callbacks=[scheduler]).fit(SupervisedFineTuning(policy), text(1))
