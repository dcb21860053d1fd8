"""What a row may change of a sum, and the noise."""

import pytest
import torch

from grade_lightning.functional.privacy import clip_factor, gaussian


@pytest.mark.parametrize("scale", [0.1, 1.0, 50.0])
def test_no_row_is_longer_than_the_bound_and_a_short_one_stays(scale: float) -> None:
    parts = [scale * torch.tensor([3.0, 0.0]), scale * torch.tensor([[4.0]])]
    factor = clip_factor(parts, bound=2.0)
    assert float(factor) * 5 * scale == pytest.approx(min(2.0, 5 * scale))


def test_an_infinite_bound_cuts_nothing_and_an_infinite_gradient_is_no_gradient() -> None:
    assert clip_factor([torch.tensor([1e30])], float("inf")) == 1
    assert clip_factor([torch.zeros(2)], 1.0) == 1
    assert clip_factor([torch.tensor([torch.inf])], 1.0).isnan()


def test_the_noise_has_its_deviation() -> None:
    noise = gaussian(torch.zeros(100_000), 0.3, seed=1)
    assert float(noise.std()) == pytest.approx(0.3, rel=0.02)
    assert abs(float(noise.mean())) < 0.005
