"""AdamW in columns of a DCT, against AdamW itself."""

import copy
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate

from grade_lightning.errors import InputError
from grade_lightning.functional.dct import dct_basis
from grade_lightning.optim import DCTAdamW

OPTIONS: list[dict[str, Any]] = [
    {},
    {"gap": 3},
    {"norm": "l1", "rotate": False},
    {"error_feedback": True, "weight_decay": 0.1},
]


def gradients(*shape: int, steps: int = 6, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for _ in range(steps)]


def run(optimizer: torch.optim.Optimizer, given: list[Tensor]) -> Tensor:
    (p,) = (p for group in optimizer.param_groups for p in group["params"])
    for gradient in given:
        p.grad = gradient.clone()
        optimizer.step()
    found: Tensor = p.detach().clone()
    return found


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_with_all_columns_it_is_adamw_on_the_transformed_matrix(shape: tuple[int, int]) -> None:
    given = gradients(*shape)
    basis = dct_basis(4, torch.float64)
    tall = shape[0] > shape[1]

    def turned(matrix: Tensor) -> Tensor:
        return matrix @ basis if tall else basis.T @ matrix

    start = torch.ones(shape, dtype=torch.float64)
    settings: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.05}
    own = run(DCTAdamW([torch.nn.Parameter(start.clone())], rank=4, **settings), given)
    other = torch.optim.AdamW([torch.nn.Parameter(turned(start))], **settings)
    torch.testing.assert_close(turned(own), run(other, [turned(g) for g in given]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(5,), (6, 2)])
def test_what_has_no_room_for_the_rank_gets_adamw(shape: tuple[int, ...]) -> None:
    given, wide = gradients(*shape), torch.nn.Parameter(torch.zeros(4, 4))
    p = torch.nn.Parameter(torch.ones(shape, dtype=torch.float64))
    groups: list[dict[str, Any]] = [{"params": [p]}, {"params": [wide], "rank": 4}]
    optimizer = DCTAdamW(groups, rank=3, lr=0.1)
    for gradient in given:
        p.grad = gradient
        optimizer.step()
    truth = run(torch.optim.AdamW([torch.nn.Parameter(torch.ones(shape, dtype=torch.float64))], lr=0.1), given)
    torch.testing.assert_close(p.detach(), truth, rtol=0, atol=1e-12)


def test_a_column_that_comes_in_takes_a_first_step() -> None:
    """Its size is the learning rate, at whatever step it comes; a column that stays keeps its moments."""
    basis = dct_basis(4, torch.float64)
    first, second, third = (torch.outer(torch.ones(5, dtype=torch.float64), basis[:, i]) for i in range(3))
    p = torch.nn.Parameter(torch.zeros(5, 4, dtype=torch.float64))
    optimizer = DCTAdamW([p], lr=0.1, rank=2, weight_decay=0)
    run(optimizer, [first + second] * 5)
    before = p.detach() @ basis
    run(optimizer, [first + 2 * third])
    moved = p.detach() @ basis - before
    torch.testing.assert_close(moved[:, 2], torch.full((5,), -0.1, dtype=torch.float64), rtol=0, atol=1e-8)
    torch.testing.assert_close(moved[:, 0], torch.full((5,), -0.1, dtype=torch.float64), rtol=0, atol=1e-8)
    assert optimizer.state[p]["step"].tolist() == [6, 1]


def test_error_feedback_loses_nothing() -> None:
    """With Adam's moments out of the way, what was applied and the error add up to the gradients."""
    given, huge = gradients(6, 4, steps=9), 1e12
    p = torch.nn.Parameter(torch.zeros(6, 4, dtype=torch.float64))
    settings: dict[str, Any] = {"rank": 1, "betas": (0.0, 0.0), "weight_decay": 0.0}
    optimizer = DCTAdamW([p], lr=huge, eps=huge, error_feedback=True, **settings)
    applied = -run(optimizer, given)
    error = optimizer.state[p]["error"]
    torch.testing.assert_close(applied + error, torch.stack(given).sum(0), rtol=0, atol=1e-9)
    assert error.abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_resumed_run_is_the_run(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Of more than 256 columns, whose numbers bfloat16 cannot hold."""
    given = gradients(264, 262, steps=4, dtype=dtype)

    def make() -> DCTAdamW:
        return DCTAdamW([torch.nn.Parameter(torch.zeros(264, 262, dtype=dtype))], rank=7, **options)

    whole, half, resumed = make(), make(), make()
    truth, middle = run(whole, given), run(half, given[:2])
    saved = copy.deepcopy(half.state_dict())
    resumed.load_state_dict(saved)
    with torch.no_grad():
        resumed.param_groups[0]["params"][0].copy_(middle)
    assert torch.equal(run(resumed, given[2:]), truth)
    state = next(iter(resumed.state.values()))
    assert state["columns"].dtype == state["step"].dtype == torch.int64


def test_it_descends_with_fewer_numbers() -> None:
    """A least-squares problem of rank 4 in 64 × 32: a quarter of the moments."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(64, 4, generator=generator) @ torch.randn(4, 32, generator=generator)
    losses = {}
    for feedback in (False, True):  # the target begins at 1
        p = torch.nn.Parameter(torch.zeros(64, 32))
        optimizer = DCTAdamW([p], lr=0.05, rank=8, weight_decay=0.0, error_feedback=feedback)
        for _ in range(100):
            optimizer.zero_grad()
            (p - target).square().mean().backward()
            optimizer.step()
        losses[feedback] = float((p.detach() - target).square().mean() / target.square().mean())
        assert sum(optimizer.state[p][name].numel() for name in ("exp_avg", "exp_avg_sq")) == 2 * 64 * 8
    assert max(losses.values()) < 0.3, losses


def test_a_rank_above_every_matrix_is_refused() -> None:
    with pytest.raises(InputError, match=r"^DCTAdamW: rank = 16, .*is 8.*LoRA[^\n]*$"):
        DCTAdamW([torch.nn.Parameter(torch.zeros(8, 64)), torch.nn.Parameter(torch.zeros(4))], rank=16)


@pytest.fixture
def one_process() -> Iterator[None]:
    os.environ.setdefault("MASTER_ADDR", "localhost")
    dist.init_process_group(
        "gloo",
        store=dist.HashStore(),  # type: ignore[attr-defined]
        rank=0,
        world_size=1,
    )
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_weights_that_are_spread_are_refused() -> None:
    mesh = init_device_mesh("cpu", (1,))
    spread = DTensor.from_local(torch.zeros(4, 4), mesh, [Replicate()])
    with pytest.raises(InputError, match=r"^DCTAdamW: .*use ddp$"):
        DCTAdamW([torch.nn.Parameter(spread)], rank=2)
