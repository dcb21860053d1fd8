"""An export is the run's last policy: it says the same and scores the same."""

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from tests.cli.conftest import QUIET, Run, Shelf, checkpoint, full_and_lora, version

FAST = ["--model.optimizer=torch.optim.Adam", "--model.optimizer.lr=0.2", "--trainer.limit_val_batches=0"]


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(name).read_text().splitlines()]


@full_and_lora
def test_the_same_completions_and_rewards_as_from_the_checkpoint(lora: list[str], run: Run, shelf: Shelf) -> None:
    """But for the KL: to an exported policy the reference is itself."""
    run("fit", *shelf.all, *lora, *FAST)
    run("predict", *shelf.all, "--output=start.jsonl")
    run("predict", *shelf.all, *lora, f"--ckpt_path={checkpoint(version())}", "--output=checkpoint.jsonl")
    run("predict", *shelf.all, f"--model.policy.path={version() / 'export'}", "--output=export.jsonl")
    start, trained, exported = (rows(f"{name}.jsonl") for name in ("start", "checkpoint", "export"))
    assert len(trained) == len(exported) == 8
    assert [row["completion"] for row in trained] != [row["completion"] for row in start]
    for one, two in zip(trained, exported, strict=True):
        assert one["completion"] == two["completion"]
        assert one["reward"] == pytest.approx(two["reward"], abs=1e-6)
        assert one["kl"] > 1e-4
        assert two["kl"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    ("method", "policy", "task"),
    [
        ("SupervisedFineTuning", "--model.policy.path", "text-generation"),
        ("RewardModel", "--model.backbone", "text-classification"),
    ],
)
def test_cards_of_the_earlier_stages(method: str, policy: str, task: str, run: Run, shelf: Shelf) -> None:
    run("fit", f"--model={method}", f"{policy}={shelf.policy}", *shelf.data, *QUIET, "--trainer.val_check_interval=2")
    card = ModelCard.load(version(method=method) / "export" / "README.md")
    assert card.data.pipeline_tag == task
    assert "| base model | policy |" in card.text
    assert "| data | LocalFiles train=reviews.csv |" in card.text
    assert "| seeds | 42 (run), 42 (data) |" in card.text
    assert "|  | step 0 | step 2 |" in card.text
    assert ("--model.reward.path export" in card.text) == (method == "RewardModel")
    assert str(shelf.policy.parent) not in card.content
