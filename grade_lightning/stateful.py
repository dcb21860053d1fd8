"""Parts of a method that remember something from batch to batch."""

from typing import Any

from grade_lightning.distributed import Reduce
from grade_lightning.records import Experience


class Stateful:
    """A part whose state is saved in checkpoints. It changes in :meth:`observe` alone, on all processes alike."""

    def observe(self, seen: Experience, reduce: Reduce) -> None:
        """Look at a batch once, after it has been trained on.

        Args:
            seen: the batch of this process, with its advantages.
            reduce: statistics over all processes; all of them call this.
        """

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and strings alone."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with what :meth:`state_dict` returned."""
