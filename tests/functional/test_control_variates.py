"""A control variate from scores of tokens: its mean is nothing, and what it takes from the gradient is known."""

import pytest
import torch

from grade_lightning.functional.control_variates import deviation, fit
from tests.functional.problems import Problem, ends, equal


@ends
@pytest.mark.parametrize("by_position", [False, True])
def test_deviations_have_mean_nothing_and_are_missed_by_the_score_function(ends: bool, by_position: bool) -> None:
    """E[Σδ] = 0, and E[Σδ ∇log π(y)] is the gradient of the expected scores with the prefixes held."""
    problem = Problem(ends)
    leaf = problem.leaf()
    logps = leaf.log_softmax(-1)
    rows = problem.rows.flatten()
    own = torch.randn(len(logps), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    scores = own[rows] if by_position else own[0]
    deltas = deviation(logps[rows], problem.tokens.flatten(), scores).view(problem.rows.shape) * problem.mask
    found = deltas.detach().sum(-1)
    probs = problem.probs(leaf)
    assert (probs * found).sum().item() == pytest.approx(0, abs=1e-12)
    (missed,) = torch.autograd.grad((probs * found).sum(), leaf, retain_graph=True)
    held = -(probs.detach().unsqueeze(1) * deltas).sum()
    equal(missed, torch.autograd.grad(held, leaf)[0])


def test_the_slope_is_that_of_rewards_within_their_groups() -> None:
    """Groups of other levels change nothing, and neither does a completion without a reward."""
    generator = torch.Generator().manual_seed(1)
    deviation = torch.randn(5, 4, dtype=torch.float64, generator=generator)
    rewards = 2.5 * deviation + torch.arange(5.0).double().unsqueeze(1)
    deviation[0, 1], rewards[0, 1] = 100.0, torch.nan
    along, size, whole = fit(rewards, deviation)
    assert (along / size).item() == pytest.approx(2.5)
    assert (along**2 / (size * whole)).item() == pytest.approx(1)
