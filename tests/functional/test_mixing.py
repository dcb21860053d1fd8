"""The mix of a biased and an unbiased gradient: its parts are right on average, and its weight is the best."""

import pytest
import torch

from grade_lightning.functional.mixing import Errors, errors, mix_weight


def draws(sets: int, parts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients (sets, parts, 3) with a shared noise; the biased one has a bias of (1, −1, 0.5)."""
    generator = torch.Generator().manual_seed(0)
    own, shared, mean = (torch.randn(sets, parts, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    truth, bias = torch.tensor([2.0, 1.0, 0.0]), torch.tensor([1.0, -1.0, 0.5])
    return truth + bias + 0.5 * own + 0.5 * shared, truth + shared + 2 * mean


def test_the_errors_are_right_on_average() -> None:
    """Of the means of four parts: 3 / 4 times the variances of a component."""
    biased, unbiased = draws(4000, 4)
    found = torch.stack(
        [torch.stack(errors(b @ b.mT, b @ u.mT, u @ u.mT)) for b, u in zip(biased, unbiased, strict=True)]
    )
    truth = torch.tensor([0.75 * 0.5, 0.75 * 5, 0.75 * 0.5, 2.25], dtype=torch.float64)
    assert ((found.mean(0) - truth).abs() < 5 * found.std(0) / len(found) ** 0.5).all()


def test_no_other_weight_has_a_smaller_error() -> None:
    biased, unbiased = (x.mean(1) for x in draws(4000, 4))
    truth = torch.tensor([2.0, 1.0, 0.0])

    def error(weight: float) -> float:
        return float((weight * biased + (1 - weight) * unbiased - truth).square().sum(-1).mean())

    best = float(mix_weight(Errors(*torch.tensor([0.375, 3.75, 0.375, 2.25]))))
    assert error(best) < min(error(best - 0.1), error(best + 0.1), error(0.0), error(1.0))


@pytest.mark.parametrize(
    ("found", "weight"),
    [
        ((0.0, 1.0, 0.0, 0.0), 1.0),
        ((1.0, 0.0, 0.0, 1.0), 0.0),
        ((0.0, 0.0, 0.0, 0.0), 0.0),
        ((1.0, 1.0, 1.5, 0.0), 0.0),
    ],
)
def test_it_stays_between_both(found: tuple[float, ...], weight: float) -> None:
    assert float(mix_weight(Errors(*torch.tensor(found)))) == weight
