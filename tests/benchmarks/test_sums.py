"""The policy of the comparison on sums, and that the comparison leaves nobody out."""

from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml  # type: ignore[import-untyped]

import grade_lightning.methods
from benchmarks.sums import base, tokenizer
from grade_lightning.data import BundledSums
from grade_lightning.modules import PolicyGradientModule

PLAN = Path(__file__).parents[2] / "configs" / "compare_sums.yaml"


def test_every_character_of_a_sum_is_a_token_and_comes_back() -> None:
    words = tokenizer()
    for row in BundledSums(num_train=50, num_test=0).load()["train"]:
        text = row["prompt"] + row["completion"]
        ids = words(text)["input_ids"]
        assert len(ids) == len(text)
        assert words.unk_token_id not in ids
        assert words.decode(ids) == text


def test_all_policy_gradients_are_compared_on_other_seeds_than_those_that_choose() -> None:
    plan = import_module("grade_lightning_cli.compare.plan").plan(**yaml.safe_load(PLAN.read_text()))
    known = vars(grade_lightning.methods).items()
    ours = {name for name, x in known if isinstance(x, type) and issubclass(x, PolicyGradientModule)}
    assert set(plan.methods) == ours
    assert not set(plan.grid_seeds) & set(plan.seeds)
    assert len(plan.seeds) >= 3


@pytest.mark.slow
def test_the_policy_learns_from_the_workings() -> None:
    """A few steps: the loss of completions that it has not seen falls below that of a uniform distribution, ln 15."""
    source = BundledSums(num_train=2_000, num_test=64)
    policy = base(source, steps=60, rows=1_500, validation=100)
    words = policy.tokenizer
    words.padding_side = "right"
    rows = source.load()["test"]
    texts = [words.bos_token + row["prompt"] + row["completion"] for row in rows]
    batch = words(texts, padding=True, return_tensors="pt")
    prompts = torch.tensor([1 + len(row["prompt"]) for row in rows]).unsqueeze(1)  # which is not trained on
    given = torch.arange(batch["input_ids"].shape[1]) < prompts
    labels = batch["input_ids"].masked_fill(given | (batch["attention_mask"] == 0), -100)
    with torch.no_grad():
        loss = policy.model(**batch, labels=labels).loss
    assert loss < 2.0
