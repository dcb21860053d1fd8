"""What a batch of the loader is to a module."""

from dataclasses import dataclass
from typing import Literal

from grade_lightning.errors import InputError

View = Literal["prompts", "labelled", "text", "pairs", "unpaired", "preferences"]


@dataclass(frozen=True)
class Batching:
    """How many rows of the data make a training batch, and what becomes of them.

    A batch is trained on in `steps_per_batch` training steps in a row. It is gone through `epochs` times, in
    `minibatches` optimizer steps each time, of `accumulation` micro-batches each. `data.batch_size` counts the
    sequences of one micro-batch on one device.

    Args:
        view: how the rows are read; a name of :data:`grade_lightning.data.views.VIEWS`.
        generations: sequences that are made of each row.
        epochs: how often a batch is gone through.
        minibatches: optimizer steps in each epoch.
        accumulation: micro-batches of an optimizer step, where one batch holds all of them; None: each micro-batch is a
            batch of its own.
        spare: further rows in a batch for each that is needed, for stages that may replace some.
        least: fewest sequences of a micro-batch, for methods that compare them.

    Example:
        >>> batching = Batching(generations=8, minibatches=4, epochs=2)
        >>> batching.rows(32), batching.completions(32), batching.steps_per_batch
        (16, 128, 8)
    """

    view: View = "prompts"
    generations: int = 1
    epochs: int = 1
    minibatches: int = 1
    accumulation: int | None = None
    spare: int = 0
    least: int = 1

    @property
    def reads_completions(self) -> bool:
        """Whether the data bring completions of their prompts, to be read by the policy."""
        return self.view in ("pairs", "unpaired")

    @property
    def parts(self) -> int:
        """Training steps in which a batch is gone through once."""
        return self.minibatches * (self.accumulation or 1)

    @property
    def steps_per_batch(self) -> int:
        """Training steps in a row that are given the same batch."""
        return self.epochs * self.parts

    def completions(self, batch_size: int) -> int:
        """Sequences that are made of a batch, on one device."""
        return batch_size * self.parts

    def rows(self, batch_size: int) -> int:
        """Rows of the data in a batch, on one device.

        Raises:
            InputError: the sequences cannot be shared out over whole rows, or are too few.
        """
        if 0 < batch_size < self.least:
            raise InputError(
                f"data.batch_size = {batch_size}: must be at least {self.least}, for the rows are compared with each "
                "other"
            )
        completions = self.completions(batch_size)
        if completions % self.generations or not completions:
            if self.accumulation is None:
                raise InputError(
                    f"data.batch_size = {batch_size}: must be a multiple of {self.generations}, the completions of a "
                    "prompt"
                )
            raise InputError(
                f"data.batch_size: {completions} completions are sampled at once, which is no multiple of "
                f"model.num_generations ({self.generations}); change one of them"
            )
        return completions // self.generations * (1 + self.spare)

    def rows_per_optimizer_step(self, rows: float, micro_batches: int) -> float:
        """Rows that an optimizer step trains on, of batches with so many `rows`; spare ones are not trained on.

        Args:
            rows: of a batch.
            micro_batches: of an optimizer step.

        Example:
            >>> Batching(minibatches=4).rows_per_optimizer_step(32, micro_batches=1)
            8.0
        """
        return rows / (1 + self.spare) * self.epochs * micro_batches / self.steps_per_batch
