"""Supervised fine-tuning, on toy text."""

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.utils.data import DataLoader
from transformers import AutoConfig

from grade_lightning.errors import InputError
from grade_lightning.methods import RewardModel, SupervisedFineTuning
from grade_lightning.policies import LoRA, Policy
from tests.conftest import make_model, make_tokenizer
from tests.methods.stages import adam, constant, labelled, saved_keys, text, trained_keys, trainer


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


def test_a_micro_batch_that_predicts_nothing(folder: Path) -> None:
    """Beside others its part of the step is 0."""
    module = SupervisedFineTuning(Policy(str(folder)), optimizer=adam)
    ids = torch.tensor([[2, 3, 4, 5], [6, 7, 8, 9], [2, 1, 1, 1], [3, 1, 1, 1]])
    rows = [{"input_ids": ids, "attention_mask": (ids != 1).long()}] * 2
    trainer(accumulate_grad_batches=2).fit(module, DataLoader(rows, batch_size=None))  # type: ignore[arg-type]
    assert module.guard.skipped == 0


def test_a_checkpoint_of_another_stage_is_named(folder: Path, tmp_path: Path) -> None:
    run = trainer(max_steps=1)
    run.fit(SupervisedFineTuning(Policy(str(folder))), text(1))
    run.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(InputError, match="of SupervisedFineTuning, but --model is RewardModel"):
        trainer().fit(RewardModel(str(folder)), labelled(1), ckpt_path=os.fspath(tmp_path / "a.ckpt"))


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


def test_texts_must_fit_into_the_context(folder: Path) -> None:
    module = SupervisedFineTuning(Policy(str(folder)))
    room = AutoConfig.from_pretrained(folder).max_position_embeddings
    module.check_lengths(prompt=10 * room, text=room)
    with pytest.raises(InputError, match=rf"{room} tokens, but texts may have {room + 1} \(--data"):
        module.check_lengths(prompt=1, text=room + 1)
