"""Opposing signals in a probe: figures, and the texts of the prompts that oppose each other."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
from torch import Tensor

from grade_lightning.callbacks.gradient_variance import GradientVariance
from tests.callbacks.watching import MeanRow, fit
from tests.conftest import make_tokenizer

SIGNS = torch.tensor([1.0, 1.0, -1.0, -1.0])


class Worded(MeanRow):
    """Its rows have texts; the gradient of each is its vector."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = make_tokenizer()

    def mean(self, batch: Any) -> Tensor:
        return super().mean(batch["rows"])


def planted(signs: Tensor) -> list[Any]:
    ids = torch.arange(2, 6).unsqueeze(1).repeat(1, 2)
    return [{"input_ids": ids, "rows": signs.unsqueeze(1) * torch.tensor([1.0, -2.0, 0.5, 0.0, 1.0, 3.0])}]


def test_prompts_that_oppose_each_other_are_named(tmp_path: Path) -> None:
    watch, logger = GradientVariance(probe_every_n_steps=1, draws=2), TensorBoardLogger(tmp_path, name="", version="")
    fit(Worded(), planted(SIGNS), watch, logger=logger)
    assert watch.metrics["probe/alignment_ratio"] == pytest.approx(0, abs=1e-6)
    assert watch.metrics["probe/opposing_share"] == pytest.approx(4 / 6)
    assert watch.metrics["probe/least_cosine"] == pytest.approx(-1)
    assert watch.opposing is not None
    one, two = watch.opposing.found.pair
    assert SIGNS[one] * SIGNS[two] == -1
    events = EventAccumulator(str(tmp_path)).Reload()
    (text,) = events.Tensors("probe/opposing/text_summary")
    table = text.tensor_proto.string_val[0].decode()
    assert f"| cosine -1.00 | w{one + 2} w{one + 2} | w{two + 2} w{two + 2} |" in table
    assert all(f"w{i} w{i}" in table.partition("farthest")[2] for i in range(2, 6))


def test_prompts_that_agree_add_up() -> None:
    watch = GradientVariance(probe_every_n_steps=1, prompts=3, draws=2)
    fit(Worded(), planted(torch.ones(4)), watch)
    assert watch.metrics["probe/alignment_ratio"] == pytest.approx(3)
    assert watch.metrics["probe/opposing_share"] == 0


@pytest.mark.parametrize("rows", [torch.ones(1, 6), torch.full((4, 6), torch.inf)], ids=["one block", "infinite"])
def test_nothing_to_compare(rows: Tensor) -> None:
    watch = GradientVariance(probe_every_n_steps=1, draws=2)
    fit(MeanRow(), [rows], watch)
    assert watch.opposing is None
    assert "probe/alignment_ratio" not in watch.metrics
