"""What is logged of a validation or a test: means over the completions of all batches and processes."""

import math
from dataclasses import fields

import torch
from torch import Tensor
from torch.nn.functional import pad

from grade_lightning.functional import sequences
from grade_lightning.records import Evaluation

from .metrics import Gather

_COLUMNS = [field.name for field in fields(Evaluation) if field.name not in ("rollout", "parts")]


class EvaluationTable:
    """Collects batches, and sums them up at the end of an epoch."""

    def __init__(self) -> None:
        self._columns: dict[str, list[Tensor]] = {}

    def add(self, found: Evaluation) -> None:
        """Add a batch."""
        columns = {name: getattr(found, name) for name in _COLUMNS}
        columns |= {f"rewards/{name}": value for name, value in found.parts.items()}
        columns |= {"tokens": found.rollout.completion_ids, "within": found.rollout.completion_mask}
        for name, value in columns.items():
            self._columns.setdefault(name, []).append(value)

    def finish(self, gather: Gather) -> dict[str, Tensor]:
        """The figures of all batches on all processes; none without a batch. The table is empty afterwards."""
        if not self._columns:
            return {}
        widths = self._columns["reward"][0].new_tensor([max(x.shape[1] for x in self._columns["tokens"])])
        longest = int(gather(widths).max())
        for name in ("tokens", "within"):
            self._columns[name] = [pad(x, (0, longest - x.shape[1])) for x in self._columns[name]]
        table = {name: gather(torch.cat(values)) for name, values in self._columns.items()}
        self._columns.clear()
        reward, length = table["reward"], table["length"]
        answered = reward[~reward.isnan()]
        spread = answered.std() if len(answered) > 1 else answered.new_zeros(())
        bigrams = sequences.distinct_bigrams(table["tokens"], table["within"].bool())
        values = {
            "reward": answered.mean(),
            "reward_std": spread,
            "reward_ci95": 1.96 * spread / math.sqrt(max(len(answered), 1)),
            "kl": table["kl"].mean(),
            "kl_per_token": table["kl"].sum() / length.sum(),
            "entropy": (table["entropy"] * length).sum() / length.sum(),
            "response_length": length.float().mean(),
            "eos_rate": table["ended"].float().mean(),
            "distinct_2": reward.new_tensor(bigrams),
            "perplexity": (table["ref_nll"].sum() / length.sum()).exp(),
        }
        values |= {name: value.nanmean() for name, value in table.items() if name.startswith("rewards/")}
        return {name: value.float() for name, value in values.items()}
