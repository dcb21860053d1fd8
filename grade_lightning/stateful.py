"""Parts of a method that remember something from batch to batch."""

from typing import Any

from grade_lightning.distributed import Reduce
from grade_lightning.records import Experience


class Stateful:
    """A part whose state is saved in checkpoints. Only :meth:`observe` changes it, and it is the same on all processes.

    A checkpoint that lacks the part's state leaves it as it was made.
    """

    def observe(self, seen: Experience, reduce: Reduce) -> None:
        """Look at a batch once: in the last step that trains on it, when its loss is known.

        That is before the step's backward pass, so the batch also counts if this step is left out because its gradient
        is not finite. A batch with an infinite reward is never shown. Whatever follows from the new state is of the
        next batch.

        Args:
            seen: the batch of this process, with its advantages; after a resume in the middle of a window, with those
                columns that are plain values.
            reduce: statistics over all processes; all of them call this.
        """

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and strings alone."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
