"""What every module shares, by the two that align nothing."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.cli import ReduceLROnPlateau
from torch import Tensor

from grade_lightning.errors import InputError
from grade_lightning.methods import RLOO, GradeSTE, RewardModel, SupervisedFineTuning
from grade_lightning.policies import Policy
from tests.methods.stages import adam, labelled, text, trainer
from tests.methods.toy_task import batches, make


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
    assert module.guard.skipped == 3
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


def plateau(monitor: str) -> Any:
    return lambda optimizer: ReduceLROnPlateau(optimizer, monitor=monitor)


def test_a_schedule_must_not_read_a_loss_that_is_no_objective() -> None:
    """Of policy gradients only the gradient means something; GradeSTE's loss is the objective's negative."""
    with pytest.raises(InputError, match=r"ReduceLROnPlateau would read train/loss, and of RLOO's"):
        trainer().fit(make(RLOO, lr_scheduler=plateau("train/loss")), batches(1))
    trainer().fit(make(RLOO, lr_scheduler=plateau("train/reward")), batches(1))
    trainer().fit(make(GradeSTE, lr_scheduler=plateau("train/loss")), batches(1))
