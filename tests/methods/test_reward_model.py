"""Reward modelling, on toy text."""

import math
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from grade_lightning.errors import InputError
from grade_lightning.methods import RewardModel
from grade_lightning.records import Rollout
from grade_lightning.rewards import ClassifierReward, SequenceClassifierReward
from tests.conftest import VOCABULARY, make_tokenizer
from tests.methods.stages import adam, constant, labelled, pairs, saved_keys, trained_keys, trainer
from tests.rewards.sequences import said_by_pipeline


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
        engine_logps=None,
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


def scored(batch: dict[str, Tensor], folder: Path) -> Tensor:
    """The preferred texts, by what a folder holds."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    rollout = Rollout(
        prompt_ids=ids[:, :3],
        prompt_mask=mask[:, :3],
        completion_ids=ids[:, 3:],
        completion_mask=mask[:, 3:].bool(),
        engine_logps=None,
        tokenizer=make_tokenizer(),
    )
    mean = (folder / "reward_head.json").exists()
    reward = ClassifierReward(str(folder), "logit") if mean else SequenceClassifierReward(str(folder))
    reward.load(make_tokenizer(), VOCABULARY)
    return reward.score(rollout).total


@pytest.mark.parametrize("head", ["mean", "last_token"])
@pytest.mark.parametrize("learns_from", ["labels", "pairs"])
def test_what_was_learnt_is_the_reward_and_what_transformers_says(
    learns_from: Literal["labels", "pairs"], head: Literal["mean", "last_token"], folder: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    module = RewardModel(str(folder), learns_from=learns_from, head=head, hidden=32, optimizer=adam)
    loader = labelled if learns_from == "labels" else pairs
    trainer().fit(module, loader(60))
    (found,) = trainer().test(module, loader(4), verbose=False)
    own = "auroc" if learns_from == "labels" else "margin"
    assert set(found) == {f"test/{name}" for name in ("loss", "accuracy", "calibration_error", own)}
    assert found["test/accuracy"] > 0.9
    module.save_pretrained(str(tmp_path))
    batch = next(iter(pairs(1)))
    module.learns_from = "pairs"
    with torch.no_grad():
        truth, _ = module(batch).chunk(2)
    torch.testing.assert_close(scored(batch, tmp_path), truth, rtol=1e-4, atol=1e-4)
    if head == "last_token":
        rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
        texts = [str(make_tokenizer().decode(ids[mask.bool()])) for ids, mask in rows]
        torch.testing.assert_close(said_by_pipeline(tmp_path, texts), truth, rtol=1e-4, atol=1e-4)


def test_a_frozen_backbone_stays_as_it_is(folder: Path) -> None:
    module = RewardModel(str(folder), learns_from="pairs", freeze_backbone=True, optimizer=adam)
    module.configure_model()
    assert [name for name, p in module.named_parameters() if p.requires_grad] == ["classifier.model.score.weight"]


def test_pairs_by_hand(folder: Path) -> None:
    """Bradley-Terry with margins and centring, accuracy, margin, and calibration of both orders of each pair."""
    torch.manual_seed(0)
    module = RewardModel(str(folder), learns_from="pairs", centring=0.3, optimizer=adam)
    trainer(max_steps=3).fit(module, pairs(3))
    loader = pairs(2)
    for batch in loader:
        batch["margins"] += torch.linspace(0, 1, len(batch["margins"]))
    (found,) = trainer().validate(module, loader, verbose=False)
    losses, wins, p = [], [], []
    for batch in loader:
        with torch.no_grad():
            chosen, rejected = module(batch).chunk(2)
        for c, r, m in zip(chosen.tolist(), rejected.tolist(), batch["margins"].tolist(), strict=True):
            losses.append(math.log1p(math.exp(-(c - r - m))) + 0.3 * (c + r) ** 2)
            wins.append(c - r)
            p.append(1 / (1 + math.exp(r - c)))
    assert found["val/loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert found["val/margin"] == pytest.approx(sum(wins) / len(wins), rel=1e-4)
    assert found["val/accuracy"] == pytest.approx(sum(w > 0 for w in wins) / len(wins))
    both = [(x, 1.0) for x in p] + [(1 - x, 0.0) for x in p]
    bins = [[(x, y) for x, y in both if k / 15 < x <= (k + 1) / 15] for k in range(15)]
    error = sum(abs(sum(x - y for x, y in b)) for b in bins) / len(both)
    assert found["val/calibration_error"] == pytest.approx(error, abs=1e-5)


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


def test_texts_must_fit_into_the_context(folder: Path) -> None:
    module = RewardModel(str(folder))
    room = AutoConfig.from_pretrained(folder).max_position_embeddings
    module.check_lengths(prompt=10 * room, text=room)
    with pytest.raises(InputError, match=rf"{room} tokens, but texts may have {room + 1} \(--data"):
        module.check_lengths(prompt=1, text=room + 1)
