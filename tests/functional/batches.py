"""Ragged batches, some way from where they were sampled, with all gates, levels and aggregations by name."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from grade_lightning.functional import gates
from grade_lightning.functional.aggregation import Normalizers, constant, sequence_mean, sequence_sum, token_mean
from grade_lightning.functional.gates import Gate
from grade_lightning.functional.losses import policy_loss
from grade_lightning.functional.ratios import Level, sequence_level, token_level, turn_level

LOW, HIGH, DUAL, TAU = 0.8, 1.28, 1.9, (1.0, 1.05)
GATES: dict[str, Gate] = {
    "reinforce": gates.reinforce,
    "importance": gates.importance,
    "clipped": partial(gates.clipped, low=LOW, high=HIGH),
    "dual": partial(gates.clipped, low=LOW, high=HIGH, dual=DUAL),
    "gppo": partial(gates.gppo, low=LOW, high=HIGH),
    "gppo dual": partial(gates.gppo, low=LOW, high=HIGH, dual=DUAL),
    "ce-gppo": partial(gates.gppo, low=LOW, high=HIGH, low_scale=0.5, high_scale=0.75),
    "cispo": partial(gates.cispo, low=LOW, high=HIGH),
    "sapo": partial(gates.sapo, tau_pos=TAU[0], tau_neg=TAU[1]),
}


class Batch(NamedTuple):
    logps: Tensor
    old_logps: Tensor
    advantages: Tensor
    mask: Tensor
    turns: Tensor


def make_batch(seed: int, constant: bool = False) -> Batch:
    """Ragged completions of several turns; every fourth token or so belongs to nobody, as a tool's output does.

    The first two are less likely than they were, the third, fourth and last likelier, whatever the level.
    """
    rows, length = 6, 12
    generator = torch.Generator().manual_seed(seed)
    old, noise, surplus = torch.randn(3, rows, length, dtype=torch.float64, generator=generator)
    lengths = torch.randint(4, length + 1, (rows, 1), generator=generator)
    mask = (torch.arange(length) < lengths) & (torch.rand(rows, length, generator=generator) < 0.8)
    turns = (torch.rand(rows, length, generator=generator) < 0.4).cumsum(-1)
    shift = torch.tensor([[-0.7], [-0.7], [0.7], [0.7], [0.0], [1.2]], dtype=torch.float64)
    if constant:
        surplus = torch.tensor([[1.0], [-0.5], [2.0], [-1.5], [0.7], [-0.9]], dtype=torch.float64).expand(6, length)
    return Batch((old + shift + 0.4 * noise).requires_grad_(), old, surplus, mask, turns)


AGGREGATIONS: dict[str, Callable[[Tensor, Normalizers], Tensor]] = {
    "token_mean": token_mean,
    "sequence_mean": sequence_mean,
    "constant": partial(constant, length=12),
    "sequence_sum": sequence_sum,
}
SEGMENTS: dict[str, Callable[[Batch], Tensor]] = {
    "token": lambda batch: torch.arange(batch.mask.shape[1]).expand_as(batch.mask),
    "turn": lambda batch: batch.turns,
    "sequence": lambda batch: torch.zeros_like(batch.turns),
}


def level_of(name: str, batch: Batch) -> Level:
    if name == "turn":
        return partial(turn_level, turns=batch.turns)
    return {"token": token_level, "sequence": sequence_level}[name]


def naive_ratio(batch: Batch, segments: Tensor) -> Tensor:
    """The exponential of the mean of log π − log π_old over each segment, with its graph; 1 outside of the mask."""
    rows = []
    for b in range(len(batch.mask)):
        row = []
        for t in range(batch.mask.shape[1]):
            same = batch.mask[b] & (segments[b] == segments[b, t])
            inside = bool(batch.mask[b, t])
            row.append((batch.logps - batch.old_logps)[b, same].mean().exp() if inside else batch.logps.new_ones(()))
        rows.append(torch.stack(row))
    return torch.stack(rows)


def gradient(batch: Batch, loss: Tensor) -> Tensor:
    return torch.autograd.grad(loss, batch.logps)[0]


def loss_line(batch: Batch, weights: Tensor, gate: Gate, level: Level) -> Tensor:
    return policy_loss(batch.logps, batch.old_logps, batch.advantages, batch.mask, weights, gate, level)


def totals_of(mask: Tensor) -> Normalizers:
    return Normalizers(float(mask.sum()), len(mask))
