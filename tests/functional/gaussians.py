"""Gradients that are Gaussian, with known means and covariances."""

import math

import torch
from torch import Tensor

MEAN = torch.tensor([0.9, -0.6, 0.3, 0.0, 0.5], dtype=torch.float64)
TRUTH = torch.tensor([1.0, -0.2, 0.1, 0.4, 0.8], dtype=torch.float64)
"""The true gradient, of which an estimator with the mean above is a biased one."""


def factor(seed: int, scale: float) -> Tensor:
    """A root of a covariance that is neither diagonal nor isotropic."""
    return scale * torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


SAMPLING, PROMPTS = factor(1, 0.5), factor(2, 0.4)
NORM, WITHIN, BETWEEN = (float(x.square().sum()) for x in (MEAN, SAMPLING, PROMPTS))


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def grams(draws: Tensor) -> Tensor:
    return draws @ draws.mT


def equal(found: Tensor, truth: Tensor | float, rtol: float = 1e-10, atol: float = 1e-10) -> None:
    expected = truth if isinstance(truth, Tensor) else found.new_tensor(truth)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


def assert_unbiased(samples: Tensor, truth: float, least: float) -> None:
    """Within four standard errors, which are themselves at most a part `least` of the truth."""
    error = float(samples.std() / math.sqrt(len(samples)))
    assert error < least * abs(truth)
    assert abs(float(samples.mean()) - truth) < 4 * error


def grouped(prompts: int, draws: int, seed: int, repetitions: int = 1) -> Tensor:
    """Gram matrices of gradients with the covariances above, of prompts and of sampling."""
    own = MEAN + normal(repetitions, prompts, 1, seed=seed) @ PROMPTS.T
    return grams((own + normal(repetitions, prompts, draws, seed=seed + 1) @ SAMPLING.T).flatten(1, 2))
