"""The training loader: shuffled anew each epoch, shared out over processes, and resumed at its row."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

RUNS = 64
"""Runs of rows among which those of similar length are looked for: more make runs more alike, and less random."""


class EpochSampler(DistributedSampler[Any]):
    """The rows in an order of seed and epoch alone, shared out over processes; Lightning calls `set_epoch`.

    All processes go through one order: of n, each takes every n-th row of it, and what cannot be shared out evenly is
    left for another epoch. So a number of rows is a place in it, whatever the number of processes.

    Args:
        rows: what is sampled from.
        seed: of the order.
        processes: that share it.
        rank: which of them this is.
        lengths: of the rows, if those of similar length are to stand together.
        run: how many of similar length follow each other then.

    Example:
        >>> one, two = EpochSampler(range(6), 0), [EpochSampler(range(6), 0, 2, rank) for rank in range(2)]
        >>> [list(sampler) for sampler in (one, *two)]
        [[2, 5, 3, 0, 1, 4], [2, 3, 1], [5, 0, 4]]
        >>> two[0].start = 3
        >>> list(two[0])
        [0]
    """

    def __init__(
        self,
        rows: Dataset[Any],
        seed: int,
        processes: int = 1,
        rank: int = 0,
        lengths: Sequence[int] | None = None,
        run: int = 1,
    ) -> None:
        super().__init__(rows, num_replicas=processes, rank=rank, seed=seed, drop_last=True)
        self.lengths, self.run = None if lengths is None else torch.tensor(lengths), run
        self.start = 0
        """Rows of the order, over all processes, that are left out at its beginning."""

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.dataset), generator=generator)  # type: ignore[arg-type]
        if self.lengths is not None:
            order = order[of_similar_length(self.lengths[order], self.run, generator)]
        rest = order[self.start :]
        shared = len(rest) // self.num_replicas * self.num_replicas
        return iter(rest[self.rank : shared : self.num_replicas].tolist())


def of_similar_length(lengths: Tensor, run: int, generator: torch.Generator) -> Tensor:
    """An order in which runs of rows have similar lengths; the runs themselves are in random order.

    Args:
        lengths: of the rows, which are in random order, (n,).
        run: rows of a run; what is left over makes a shorter one, which is the last.
        generator: shuffles the runs.

    Example:
        >>> of_similar_length(torch.tensor([5, 1, 4, 2, 9]), 2, torch.Generator().manual_seed(0)).tolist()
        [1, 3, 2, 0, 4]
    """
    order = lengths.argsort(stable=True)
    order = order[(order // (RUNS * run)).argsort(stable=True)]
    whole = len(order) // run * run
    runs = order[:whole].view(-1, run)
    return torch.cat([runs[torch.randperm(len(runs), generator=generator)].flatten(), order[whole:]])


class ResumableLoader(DataLoader[Any]):
    """A loader that gives out each batch `repeats` times in a row, and whose place goes into Lightning's checkpoints.

    The place is a number of rows over all processes, so that no row is given out twice or left out where a run resumes
    with batches of another size, or with other processes. Its length counts the batches given out.

    Args:
        dataset: the rows.
        repeats: how often each batch is given out.
        on_resume: called with the batches, of today's size, that lie before the place of a checkpoint.
        **options: those of torch's `DataLoader`; an :class:`EpochSampler` among them is shared out over its processes.
    """

    _start = (0, 0)
    """Rows at which the next epoch begins, and how often the batch there was given out."""
    _place = (0, 0)
    """The same for the epoch that is being given out."""

    def __init__(
        self,
        dataset: Any,
        repeats: int = 1,
        on_resume: Callable[["ResumableLoader", int], None] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dataset, **options)
        # Lightning looks for these names when it builds the loader anew for a sampler of its own
        self.repeats, self.on_resume = repeats, on_resume

    @property
    def processes(self) -> int:
        """That share the rows."""
        return getattr(self.sampler, "num_replicas", 1)

    @property
    def _rows(self) -> int:
        """Of a batch, over all processes."""
        return (self.batch_size or 1) * self.processes

    @property
    def _settings(self) -> dict[str, int]:
        sizes = {"batch": self.batch_size or 1, "repeats": self.repeats, "processes": self.processes}
        return sizes | {"of": self._total}

    @property
    def _total(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return super().__len__() * self.repeats

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        (start, given), self._start = self._start, (0, 0)
        skip = 0
        if isinstance(self.sampler, EpochSampler):
            self.sampler.start = start
        else:
            skip = start // self._rows
        self._place = start, given
        for number, batch in enumerate(super().__iter__()):
            if number < skip:
                continue
            for _ in range(given, self.repeats):
                given += 1
                self._place = (start, given) if given < self.repeats else (start + self._rows, 0)
                yield batch
            start, given = start + self._rows, 0

    def _left(self, rows: int) -> int:
        """Batches that are given out after so many rows of an epoch."""
        if isinstance(self.sampler, EpochSampler):
            return max(0, self._total - rows) // self._rows * self.repeats
        return max(0, super().__len__() - rows // self._rows) * self.repeats

    def state_dict(self) -> dict[str, int]:
        """Say how many rows of the epoch were given out, and in which batches."""
        rows, given = self._place
        return self._settings | {"rows": rows, "given": given, "over": not given and not self._left(rows)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begin the next epoch after those rows, or at its start if they were all.

        The rest of the repeats goes on only with batches of the same rows.
        """
        if "rows" not in state:
            state = self._of_batches(state["given"])
        rows, given, now = state["rows"], state["given"], self._settings
        if changed := [name for name, value in now.items() if state[name] != value]:
            rows, given = rows + (state["batch"] * state["processes"] if given else 0), 0
        over = state["over"] or not (given or self._left(rows))
        self._start = (0, 0) if over else (rows, given)
        if changed and changed != ["processes"]:
            said = "{batch} of {of} rows a batch, {repeats} steps on each, {processes} processes"
            rank_zero_warn(
                f"checkpoint: it is of {said.format(**state)}; this run is of {said.format(**now)}. The epoch resumes "
                f"after the {state['rows']} rows that were given out; the noise differs, and a window of "
                "completions that was begun is dropped"
            )
        if self.on_resume is not None:
            self.on_resume(self, len(self) if over else len(self) - self._left(rows) + given)

    def rewind(self) -> None:
        """Begin the next epoch at its start."""
        self._start = (0, 0)

    def _of_batches(self, given: int) -> dict[str, int]:
        """The place in a checkpoint of an earlier version, which is a number of batches."""
        rank_zero_warn(
            f"checkpoint: it is of an earlier version, whose place in the data is {given} batches; they are read as "
            "batches of the present size and processes, so give the --data.batch_size that the run had"
        )
        whole, given = divmod(given, self.repeats)
        rows = whole * self._rows
        return self._settings | {"rows": rows, "given": given, "over": not given and not self._left(rows)}


def resume_epoch(trainer: Trainer, loader: ResumableLoader, behind: int) -> None:
    """Have Lightning count the batches of the epoch in those of today, so that it ends with the last of them.

    Args:
        trainer: of the run, its loops restored.
        loader: of its training rows.
        behind: batches before the place where it resumes.
    """
    progress, limit = trainer.fit_loop.epoch_loop.batch_progress, trainer.limit_train_batches
    length = min(len(loader), limit) if isinstance(limit, int) else int(len(loader) * limit)
    if progress.is_last_batch or behind >= length:
        progress.is_last_batch, behind = True, length
        loader.rewind()
    current = progress.current
    further = behind - current.ready
    for name in ("ready", "started", "processed", "completed"):
        setattr(current, name, getattr(current, name) + further)
