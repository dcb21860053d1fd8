"""The place in the data is a number of rows: a run resumes at the next one, in whatever batches and processes."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from grade_lightning.data import Source, TextDataModule
from grade_lightning.data.loading import EpochSampler, ResumableLoader, of_similar_length
from grade_lightning.modules import TrainableModule
from grade_lightning.records import Batching
from tests.cli.ranks import launch
from tests.conftest import make_tokenizer, mostly_slow

ROWS = 64


LENGTHS = [i * 37 % 1009 for i in range(ROWS)]


def loaders(
    batch: int, processes: int = 1, repeats: int = 1, rows: int = ROWS, run: int | None = None
) -> list[ResumableLoader]:
    """The loader of each process."""
    lengths = (None, 1) if run is None else (LENGTHS, run)
    return [
        ResumableLoader(
            list(range(rows)),
            repeats=repeats,
            batch_size=batch,
            sampler=EpochSampler(range(rows), 0, processes, rank, *lengths),  # type: ignore[arg-type]
            drop_last=True,
            collate_fn=list,
        )
        for rank in range(processes)
    ]


def take(shared: list[ResumableLoader], steps: int | None = None) -> list[list[int]]:
    """What all processes together are given in each step."""
    batches = list(zip(*(list(loader) for loader in shared), strict=True))
    return [sorted(row for part in step for row in part) for step in batches[:steps]]


def give(shared: list[ResumableLoader], steps: int) -> list[list[int]]:
    """The first steps of an epoch, which is left there."""
    epochs = [iter(loader) for loader in shared]
    return [sorted(row for epoch in epochs for row in next(epoch)) for _ in range(steps)]


def flat(batches: list[list[int]]) -> list[int]:
    return [row for batch in batches for row in batch]


@pytest.mark.parametrize("given", [0, 4, 6, 7, 14])
def test_loader_continues_between_the_repeats(given: int) -> None:
    loader = ResumableLoader(range(14), repeats=2, batch_size=2)
    whole = [batch.tolist() for batch in loader]
    batches = iter(loader)
    for _ in range(given):
        next(batches)
    state = loader.state_dict() if given else ResumableLoader(range(14), repeats=2, batch_size=2).state_dict()
    assert (state["rows"], state["given"]) == (given // 2 * 2, given % 2)
    again = ResumableLoader(range(14), repeats=2, batch_size=2)
    again.load_state_dict(state)
    assert [batch.tolist() for batch in again] == whole[given % 14 :]
    assert [batch.tolist() for batch in again] == whole
    old = ResumableLoader(range(14), repeats=2, batch_size=2)
    with pytest.warns(UserWarning, match=f"of an earlier version, whose place in the data is {given} batches"):
        old.load_state_dict({"given": given})
    assert [batch.tolist() for batch in old] == whole[given % 14 :]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_share_one_order(processes: int) -> None:
    """Together each step's rows are those of one process with as many."""
    assert take(loaders(12 // processes, processes)) == take(loaders(12))


def test_rows_of_similar_length_are_given_in_one_step() -> None:
    """To all processes together, each row once, and the lengths of steps in no order."""
    steps = take(loaders(4, 2, run=8))
    assert sorted(flat(steps)) == list(range(ROWS))
    ranks = sorted(range(ROWS), key=LENGTHS.__getitem__)
    assert sorted(sorted(ranks.index(row) for row in step) for step in steps) == [
        list(range(start, start + 8)) for start in range(0, ROWS, 8)
    ]
    first = [LENGTHS[step[0]] for step in steps]
    assert first not in (sorted(first), sorted(first, reverse=True))


def test_only_rows_that_stand_near_each_other_change_places() -> None:
    lengths = torch.randint(1000, (1000,), generator=torch.Generator().manual_seed(0))
    order = of_similar_length(lengths, 4, torch.Generator().manual_seed(0))
    assert sorted(order.tolist()) == list(range(1000))
    spread = lengths[order].view(-1, 4)
    assert float((spread.amax(1) - spread.amin(1)).float().mean()) < 30  # of random rows 600
    assert all(len({int(row) // (64 * 4) for row in rows}) == 1 for rows in order.view(-1, 4))


@pytest.mark.parametrize("run", [None, 8])
@pytest.mark.parametrize("steps", [0, 1, 3, 8, 15, 16])
@pytest.mark.parametrize(
    ("before", "after"),
    [((4, 1), (8, 1)), ((4, 1), (2, 1)), ((4, 1), (2, 2)), ((2, 2), (4, 1)), ((2, 2), (4, 2)), ((4, 1), (1, 3))],
)
def test_each_row_is_given_once(steps: int, before: tuple[int, int], after: tuple[int, int], run: int | None) -> None:
    """In the middle of an epoch and at its end, in other batches and on another number of processes."""
    first, second = loaders(*before, run=run), loaders(*after, run=run)
    seen = flat(give(first, steps))
    for loader in second:
        if steps:
            loader.load_state_dict(first[0].state_dict())
    rest = flat(take(second))
    order, size = next(next(iter(loader)) for loader in loaders(ROWS, run=run)), after[0] * after[1]
    wanted = order[len(seen) :] if ROWS - len(seen) >= size else order  # no batch is left: the next epoch
    assert sorted(rest) == sorted(wanted[: len(wanted) // size * size])
    assert len(flat(take(second))) == ROWS // size * size  # the epoch after it is whole


@pytest.mark.parametrize(("before", "after"), [((4, 3), (8, 3)), ((4, 3), (4, 2)), ((8, 2), (4, 3))])
def test_a_window_in_other_batches_is_dropped_and_said(before: tuple[int, int], after: tuple[int, int]) -> None:
    """What follows is the row after the window, whose rows were trained on."""
    first, second = loaders(before[0], repeats=before[1])[0], loaders(after[0], repeats=after[1])[0]
    (seen, *_) = give([first], 1)
    with pytest.warns(UserWarning, match="and a window of completions that was begun is dropped") as said:
        second.load_state_dict(first.state_dict())
    assert len(said) == 1
    rest = flat(take([second]))
    assert not set(seen) & set(rest)
    assert len(set(seen) | set(rest)) == len(seen) + (ROWS - len(seen)) // after[0] * after[0]


# ---- in a Trainer ---------------------------------------------------------------------------------------------------


class Numbers(Source):
    """Texts that are numbers."""

    def load(self) -> DatasetDict:
        rows = range(ROWS + 4)
        texts = {"prompt": [f"w{2 + i % 17} w{2 + i // 17}" for i in rows], "number": list(rows)}
        return DatasetDict(train=Dataset.from_dict(texts))


class Reader(TrainableModule):
    """Writes down the rows of each step, with their epoch."""

    tokenizer = make_tokenizer()

    def __init__(self, batching: Batching) -> None:
        super().__init__(torch.optim.SGD, None)
        self.own = batching
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, int, list[int]]] = []

    @property
    def batching(self) -> Batching:
        return self.own

    def save_pretrained(self, folder: str, merge: bool = True) -> None: ...

    def draw_loss(self, batch: Any) -> Tensor:
        return self.weight

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append((self.current_epoch, self.global_step, batch["columns"]["number"]))
        return self.weight.square()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(
    folder: Path, batch: int, batching: Batching = Batching(), ckpt_path: Path | None = None, **options: Any
) -> Reader:
    """Two epochs, a checkpoint after each step."""
    module = Reader(batching)
    save = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    settings: dict[str, Any] = {"max_epochs": 2, "callbacks": save, "accelerator": "cpu", "devices": 1}
    trainer = Trainer(
        **settings | options,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    sizes: dict[str, Any] = {"reward_size": 0, "prompt_size": ROWS, "val_size": 2, "test_size": 2}
    trainer.fit(module, datamodule=TextDataModule(Numbers(), batch, **sizes), ckpt_path=ckpt_path, weights_only=True)
    return module


def epochs_of(*modules: Reader) -> list[list[int]]:
    """The rows of each epoch."""
    found: list[list[int]] = [[], []]
    for module in modules:
        for epoch, _, rows in module.seen:
            found[epoch] += rows
    return found


def until(module: Reader, step: int) -> Reader:
    """What was seen before so many optimizer steps."""
    part = Reader(module.own)
    part.seen = [seen for seen in module.seen if seen[1] < step]
    return part


CHANGES: dict[str, tuple[int, int, int, int]] = {
    "larger batches": (4, 8, 1, 1),
    "smaller batches": (8, 4, 1, 1),
    "accumulation": (4, 4, 1, 2),
    "no accumulation": (4, 4, 2, 1),
    "both": (8, 4, 1, 2),
}


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("part", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("change", mostly_slow(CHANGES, "larger batches", "no accumulation"))
def test_a_resumed_run_sees_each_row_of_an_epoch_once(change: str, part: float, windows: bool, tmp_path: Path) -> None:
    """Each epoch's order is that of a run that changed nothing, and each optimizer step has its rows."""
    before, after, one, two = CHANGES[change]
    first = fit(tmp_path, before, Batching(accumulation=one if windows else None), accumulate_grad_batches=one)
    step = int(ROWS * part) // (before * one)
    path = tmp_path / f"step={step}.ckpt"
    for how in ({"max_epochs": 2}, {"max_epochs": -1, "max_steps": step + int(ROWS * (2 - part)) // (after * two)}):
        batching = Batching(accumulation=two if windows else None)
        rest = fit(tmp_path / "rest", after, batching, path, accumulate_grad_batches=two, **how)
        if windows:  # each batch comes once for each of its micro-batches
            rows = [sorted(set(epoch)) for epoch in epochs_of(until(first, step), rest)]
            assert rows == [sorted(set(epoch)) for epoch in epochs_of(first)]
            counts = [epoch.count(row) for epoch in epochs_of(rest) for row in set(epoch)]
            assert set(counts) == {two}
        else:
            assert epochs_of(until(first, step), rest) == epochs_of(first)
            per_step = [len([s for s in rest.seen if s[1] == number]) for number in {s[1] for s in rest.seen}]
            assert set(per_step) == {two}


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_the_rest_that_makes_no_batch_is_left_out(tmp_path: Path) -> None:
    """Of 64 rows 60 were given: with batches of 16 the next one is of the next epoch, which is whole."""
    first = fit(tmp_path, 4, limit_train_batches=15)
    rest = fit(tmp_path / "rest", 16, ckpt_path=tmp_path / "step=15.ckpt")
    assert epochs_of(rest)[0] == []
    assert sorted(epochs_of(rest)[1]) == sorted(epochs_of(fit(tmp_path / "plain", 16))[1])
    assert len(epochs_of(first)[0]) == 60


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_shortened_epoch_is_over_where_it_ended(tmp_path: Path) -> None:
    """With `limit_train_batches` the next epoch begins at its start, not after as many batches."""
    whole = fit(tmp_path, 4, limit_train_batches=10)
    rest = fit(tmp_path / "rest", 4, ckpt_path=tmp_path / "step=10.ckpt", limit_train_batches=10)
    steps = fit(tmp_path / "steps", 4, ckpt_path=tmp_path / "step=10.ckpt", limit_train_batches=10, max_steps=20)
    assert epochs_of(rest)[1] == epochs_of(steps)[1] == epochs_of(whole)[1]
    assert len(epochs_of(whole)[1]) == 40


# ---- processes ------------------------------------------------------------------------------------------------------

PAIR: dict[str, Any] = {"devices": 2, "strategy": "ddp"}


def work(folder: Path, alone: Path) -> None:
    """What each of two processes does: a run of its own, and the rest of runs of one process."""
    rank = os.environ.get("LOCAL_RANK", "0")
    found = {"own": fit(folder / "pair", 2, **PAIR).seen}
    for step in (5, 16):
        found[str(step)] = fit(folder / f"rest{step}", 2, ckpt_path=alone / f"step={step}.ckpt", **PAIR).seen
    (folder / f"{rank}.json").write_text(json.dumps(found))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_other_processes_see_the_next_rows(tmp_path: Path) -> None:
    """From one to two and from two to one, in the middle of an epoch and at its end."""
    alone = fit(tmp_path / "alone", 4)
    done = launch("-m", "tests.data.test_loading", str(tmp_path), str(tmp_path / "alone"), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "it is of 1 processes and this run has 2" in done.stderr
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]

    def pair(name: str) -> Reader:
        both = Reader(Batching())
        both.seen = [tuple(seen) for steps in zip(*(rank[name] for rank in ranks), strict=True) for seen in steps]
        return both

    whole = [sorted(epoch) for epoch in epochs_of(alone)]
    assert [len(set(epoch)) for epoch in whole] == [ROWS, ROWS]
    for step in (5, 16):
        assert [sorted(epoch) for epoch in epochs_of(until(alone, step), pair(str(step)))] == whole
        rest = fit(tmp_path / "rest", 4, ckpt_path=tmp_path / "pair" / f"step={step}.ckpt")
        assert [sorted(epoch) for epoch in epochs_of(until(pair("own"), step), rest)] == whole
        assert rest.seen == alone.seen[step:]  # in the very order


if __name__ == "__main__":
    work(*map(Path, sys.argv[1:]))
