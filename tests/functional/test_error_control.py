"""Compressed gradients: what is applied and what is kept add up, and its relatives are special cases."""

import pytest
import torch
from torch import Tensor

from grade_lightning.functional.error_control import dense, largest, received, to_send

WORKERS, SIZE = 4, 8


def compressed(vector: Tensor, share: float = 1 / SIZE) -> Tensor:
    return dense(largest(vector, share), SIZE)


def random_gradients(steps: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(steps, WORKERS, SIZE, dtype=torch.float64, generator=generator)


def run(gradients: Tensor, eta: float, share: float = 1 / SIZE) -> tuple[Tensor, Tensor]:
    """What is applied at each step, and the mean error after the last."""
    errors, own = torch.zeros(2, WORKERS, SIZE, dtype=torch.float64)
    errors, own, applied = list(errors), list(own), []
    for step in gradients:
        for i, gradient in enumerate(step):
            message = compressed(to_send(gradient, errors[i], own[i], eta), share)
            errors[i], own[i] = received(gradient, errors[i], own[i], message)
        applied.append(torch.stack(own).mean(0))
    return torch.stack(applied), torch.stack(errors).mean(0)


@pytest.mark.parametrize("eta", [0.0, 0.125, 1.0])
def test_what_is_applied_and_the_error_are_the_sum_of_the_gradients(eta: float) -> None:
    gradients = random_gradients(30)
    applied, error = run(gradients, eta)
    torch.testing.assert_close(applied.sum(0) + error, gradients.mean(1).sum(0), rtol=0, atol=1e-12)
    assert error.norm() > 0.1


def test_without_eta_it_is_ef21() -> None:
    """An estimate to which C(g − h) is added."""
    gradients = random_gradients(20)
    estimates, truth = torch.zeros(WORKERS, SIZE, dtype=torch.float64), []
    for step in gradients:
        estimates = estimates + torch.stack([compressed(x) for x in step - estimates])
        truth.append(estimates.mean(0))
    torch.testing.assert_close(run(gradients, eta=0.0)[0], torch.stack(truth), rtol=0, atol=1e-12)


def test_with_all_components_it_is_the_mean_gradient() -> None:
    gradients = random_gradients(20)
    applied, error = run(gradients, eta=0.125, share=1.0)
    torch.testing.assert_close(applied, gradients.mean(1), rtol=0, atol=1e-12)
    assert error.abs().max() < 1e-12


def test_with_the_estimate_held_at_nothing_it_is_classic_error_feedback() -> None:
    gradient, error, zero = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.0]), torch.zeros(2)
    message = dense(largest(to_send(gradient, error, zero, 1.0), 0.5), 2)
    assert message.tolist() == [4.0, 0.0]
    assert received(gradient, error, zero, message)[0].tolist() == [0.0, 2.0]


@pytest.mark.slow
def test_workers_that_disagree_find_the_common_optimum() -> None:
    """Least squares of four workers, one component in eight: plain compression stalls, EF21 and EControl do not."""
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(WORKERS, 12, SIZE, dtype=torch.float64, generator=generator)
    targets = torch.randn(WORKERS, 12, dtype=torch.float64, generator=generator) * 3
    best = torch.linalg.lstsq(matrices.flatten(0, 1), targets.flatten()).solution
    ends = {}
    for eta in (None, 0.0, 0.05, 0.125):
        x = torch.zeros(SIZE, dtype=torch.float64)
        errors, own = torch.zeros(2, WORKERS, SIZE, dtype=torch.float64)
        for _ in range(2000):
            gradients = torch.einsum("wij,wi->wj", matrices, matrices @ x - targets) / 12
            if eta is None:
                x = x - 0.05 * torch.stack([compressed(g) for g in gradients]).mean(0)
                continue
            messages = torch.stack(
                [
                    compressed(m)
                    for m in to_send(gradients.flatten(), errors.flatten(), own.flatten(), eta).view(WORKERS, SIZE)
                ]
            )
            errors, own = (
                x.view(WORKERS, SIZE) for x in received(*(y.flatten() for y in (gradients, errors, own, messages)))
            )
            x = x - 0.05 * own.mean(0)
        ends[eta] = float((x - best).norm())
    assert ends[None] > 0.1
    assert max(value for eta, value in ends.items() if eta is not None) < 1e-9, ends
