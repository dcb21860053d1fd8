"""Optimizers of pytorch-optimizer: the numbers that show whether its version is right, and GaLore by our names."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from grade_lightning.errors import InputError
from grade_lightning.optim import GaLore

pytorch_optimizer = pytest.importorskip("pytorch_optimizer")


def descend(optimizer: torch.optim.Optimizer, given: list[Tensor]) -> Tensor:
    p = optimizer.param_groups[0]["params"][0]
    for gradient in given:
        p.grad = gradient.clone()
        optimizer.step()
    found: Tensor = p.detach().clone()
    return found


@pytest.mark.parametrize(
    ("make", "end"), [(pytorch_optimizer.DiffGrad, -0.288174), (torch.optim.Adam, -0.381488)], ids=["diffgrad", "adam"]
)
def test_diffgrad_is_not_adam(make: Any, end: float) -> None:
    """It is in some versions before 4.1: the friction is computed and then left out."""
    optimizer = make([torch.nn.Parameter(torch.zeros(1))], lr=0.1, weight_decay=0.0)
    given = [torch.tensor([g]) for g in (1.0, 0.5, -0.3, 2.0, 0.1)]
    assert float(descend(optimizer, given)) == pytest.approx(end, abs=1e-6)


def test_of_gradients_as_small_as_a_clipped_models_diffgrad_is_adam_at_half_the_rate() -> None:
    given = [1e-4 * torch.tensor([g]) for g in (1.0, 0.5, -0.3, 2.0, 0.1)]
    ends = [
        float(descend(make([torch.nn.Parameter(torch.zeros(1))], lr=0.1, eps=0.0, weight_decay=0.0), given))
        for make in (pytorch_optimizer.DiffGrad, torch.optim.Adam)
    ]
    assert ends[0] / ends[1] == pytest.approx(0.5, abs=1e-4)


def test_without_moments_the_step_is_the_projected_one() -> None:
    """U (Uᵀ g / |Uᵀ g|), with U from an SVD of our own."""
    gradient = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    optimizer = GaLore([torch.nn.Parameter(torch.zeros(4, 7))], lr=1.0, rank=2, scale=1.0, betas=(0.0, 0.0), eps=0.0)
    left = torch.linalg.svd(gradient).U[:, :2]
    torch.testing.assert_close(descend(optimizer, [gradient]), -left @ (left.T @ gradient).sign(), rtol=1e-4, atol=1e-4)


def test_a_resumed_run_is_the_run() -> None:
    """And its checkpoint holds tensors and numbers alone."""
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(6, 5, generator=generator) for _ in range(5)]

    def make() -> GaLore:
        return GaLore([torch.nn.Parameter(torch.zeros(6, 5)), torch.nn.Parameter(torch.zeros(5))], rank=2, gap=4)

    whole, half, resumed = make(), make(), make()
    truth, middle = descend(whole, given), descend(half, given[:2])
    saved = copy.deepcopy(half.state_dict())
    assert {type(value) for value in saved["state"][0]["projector"].values()} <= {torch.Tensor, int}
    resumed.load_state_dict(saved)
    with torch.no_grad():
        resumed.param_groups[0]["params"][0].copy_(middle)
    torch.testing.assert_close(descend(resumed, given[2:]), truth, rtol=0, atol=0)
    assert half.state[half.param_groups[0]["params"][0]]["exp_avg"].shape == (6, 2)


def test_a_rank_above_every_matrix_is_refused() -> None:
    with pytest.raises(InputError, match=r"^GaLore: rank = 8, .*is 5.*LoRA[^\n]*$"):
        GaLore([torch.nn.Parameter(torch.zeros(6, 5))], rank=8)
    GaLore([torch.nn.Parameter(torch.zeros(1))])  # no matrix at all, as when the learning rate is asked for


def test_by_its_own_class_path_it_projects_nothing() -> None:
    """Why there is one of ours."""
    optimizer = pytorch_optimizer.GaLore([torch.nn.Parameter(torch.zeros(6, 5))])
    descend(optimizer, [torch.ones(6, 5)])
    (state,) = optimizer.state.values()
    assert state["exp_avg"].shape == (6, 5)
