"""Optimizers of bitsandbytes by their class path: what docs/memory_and_optimizers.md says of them."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

bitsandbytes = pytest.importorskip("bitsandbytes")

SHAPE = (64, 80)  # matrices below 4,096 numbers keep moments of 32 bits


def gradients(steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(SHAPE, generator=generator) for _ in range(steps)]


def descend(optimizer: torch.optim.Optimizer, given: list[Tensor]) -> Tensor:
    p = optimizer.param_groups[0]["params"][0]
    for gradient in given:
        p.grad = gradient.clone()
        optimizer.step()
    found: Tensor = p.detach().clone()
    return found


def make(start: Tensor) -> torch.optim.Optimizer:
    found: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit([torch.nn.Parameter(start.clone())], lr=0.01)
    return found


def test_it_is_adamw_with_a_quarter_of_the_moments() -> None:
    """Each gradient component goes the same way for 20 steps: Adam moves by the learning rate."""
    given = [gradients(1)[0].sign() * (1 + 0.1 * step) for step in range(20)]
    ours, plain = make(torch.zeros(SHAPE)), torch.optim.AdamW([torch.nn.Parameter(torch.zeros(SHAPE))], 0.01)
    found, truth = descend(ours, given), descend(plain, given)
    assert (found - truth).abs().mean() < 0.05 * truth.abs().mean()
    (state,) = ours.state.values()
    moments = sum(x.nbytes for name, x in state.items() if isinstance(x, Tensor) and name.startswith("state"))
    assert moments == 2 * SHAPE[0] * SHAPE[1]


def test_a_resumed_run_is_the_run(tmp_path: Path) -> None:
    """Through a file that is read as weights alone."""
    given = gradients(6)
    whole, half = make(torch.zeros(SHAPE)), make(torch.zeros(SHAPE))
    truth, middle = descend(whole, given), descend(half, given[:3])
    torch.save(half.state_dict(), tmp_path / "state")
    resumed = make(middle)
    resumed.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert torch.equal(descend(resumed, given[3:]), truth)
